"""Answer clips by an LLM on an OpenAI-compatible server that takes prompt embeddings (docs/serving.md).

python examples/serving_client.py http://HOST:8000/v1 split/client --check
python examples/serving_client.py http://HOST:8000/v1 split/client clip.mp4 frames/
"""

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch

from aullm_dist.data.inputs import InputClips
from aullm_dist.errors import UserError
from aullm_dist.release.predicting import crops_of, explain_clip
from aullm_dist.release.served import largest_difference, load_served

WORDS = 20
"""Log-probabilities to ask for; the vocabulary has a word for each AU and one more."""


def encoded(embeddings: torch.Tensor) -> str:
    """Return embeddings `[T, D]` as the server reads them: a file of torch in base64. Nothing is read so here."""
    stream = io.BytesIO()
    torch.save(embeddings, stream)
    return base64.b64encode(stream.getvalue()).decode()


def asker(url: str, model: str, key: str):
    """Return what asks the server: embeddings `[T, D]` in, log-probability of each word out."""

    def ask(embeddings: torch.Tensor) -> dict[str, float]:
        body = {"model": model, "prompt": "", "prompt_embeds": encoded(embeddings)}
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": WORDS}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url.rstrip('/')}/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                choice = json.load(response)["choices"][0]
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
        except urllib.error.URLError as error:
            raise UserError(f"{url}: cannot be reached ({error.reason})") from error
        return choice["logprobs"]["top_logprobs"][0]

    return ask


def main(argv: list[str] | None = None) -> int:
    """Answer the clips, or the release's probe clips; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server's API, ending in /v1")
    parser.add_argument("client", type=Path, help="client/ of what aullm-dist release split wrote")
    parser.add_argument("clips", nargs="*", help="folders of frames, videos or prepared datasets")
    parser.add_argument("--model", default="aullm", help="the name that the server gives to the LLM (aullm)")
    parser.add_argument("--key", default="none", help="API key, where the server wants one")
    parser.add_argument("--check", action="store_true", help="compare the server's answers with the release's own")
    args = parser.parse_args(argv)
    release = load_served(args.client, asker(args.url, args.model, args.key))
    if args.check:
        print(f"largest difference of a logit on the release's probe clips: {largest_difference(release):.1e}")
    if not args.clips:
        return 0
    for text in release.caveats:
        print(f"Note: {text}.", file=sys.stderr)
    clips = InputClips(args.clips, size=release.size, trained=crops_of(release.config, release.crop))
    for index in range(len(clips)):
        logits = explain_clip(release.model, clips.clip(index), release.num_frames, release.device).logits[0]
        for au, probability in zip(release.aus, torch.sigmoid(logits).tolist(), strict=True):
            active = "active" if probability > release.thresholds.values[au] else ""
            print(f"{clips.samples[index].sample_id}\tAU{au}\t{probability:.3f}\t{active}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
