"""An OpenAI-compatible server of one LLM that takes prompt embeddings, by transformers' own `generate`.

It answers `POST /v1/completions` as vLLM with `--enable-prompt-embeds` documents it: one prompt of embeddings, and the
log-probabilities of the first words of the answer.
"""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_WORDS = 20
"""As vLLM's `--max-logprobs` is by default."""


@contextmanager
def served(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[str]:
    """Serve the LLM of a folder on a free loopback port, and yield the URL of its API."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, answer = _answer(model, tokenizer, body) if self.path == "/v1/completions" else (404, {"error": "?"})
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(model, tokenizer, body: dict) -> tuple[int, dict]:
    if body["model"] != "aullm" or body["max_tokens"] != 1 or body["logprobs"] > MOST_WORDS:
        return 400, {"error": "this server answers one word of the model aullm"}
    stream = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
    embeddings = torch.load(stream, weights_only=True).to(model.dtype)
    out = model.generate(
        inputs_embeds=embeddings[None], attention_mask=torch.ones(1, len(embeddings), dtype=torch.long),
        max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    scores = out.logits[0][0].float().log_softmax(-1)
    best = scores.topk(min(body["logprobs"], len(scores)))
    words = tokenizer.convert_ids_to_tokens(best.indices.tolist())
    return 200, {"choices": [{"logprobs": {"top_logprobs": [dict(zip(words, best.values.tolist(), strict=True))]}}]}
