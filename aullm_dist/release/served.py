"""Runs a release whose LLM is on a server: computes everything else here, and asks the LLM by embeddings."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aullm_dist.checkpoint.store import SavedState
from aullm_dist.checkpoint.tensor_plan import MODULES_FILE, plan_tensors
from aullm_dist.config import from_dict
from aullm_dist.errors import UserError
from aullm_dist.files import read_json
from aullm_dist.llm.backbone import Backbone
from aullm_dist.model.assembly import assemble
from aullm_dist.model.prompt import Prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.model.relations import build_relations
from aullm_dist.release.layout import CONFIG_FILE, PROBE_FILE
from aullm_dist.release.loading import Release, release_of
from aullm_dist.release.probe import answer_probe, read_probe
from aullm_dist.release.splitting import NOTHING, PROMPT_FILE, words_of

Ask = Callable[[Tensor], Mapping[str, float]]
"""Sends the embeddings of a prompt `[T, D]` and returns the log-probability of each word of the served LLM."""


class _StaticEmbeddings(nn.Module):
    """Stands in for an LLM whose embeddings of the prompt's words are known."""

    def __init__(self, static: Tensor) -> None:
        super().__init__()
        self.static = static

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        return lambda ids: self.static


class ServedReasoner(Reasoner):
    """Asks a server for the answer: once for each branch, or with a marker per AU once for each of these."""

    ask: Ask
    words: list[str]

    def forward(  # type: ignore[override]  # there are no hidden states to return
        self, content: Tensor, instruction: Tensor | None, branches: Tensor, *, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, None]:
        """Answer as `Reasoner.forward`, with None in place of the hidden states.

        Raises:
            UserError: the server returned no log-probability of a word.
        """
        prefix, suffix = self._embeds(content, instruction, branches)
        logits = torch.stack([self._logits(torch.cat([prefix, each])) for each in suffix])
        bias = self.au_bias if self.prompt.readout == "per_au" else self.au_head.bias
        logits = logits + bias
        return (logits, None) if return_hidden else logits

    def _logits(self, prompt: Tensor) -> Tensor:
        """Return the answer `[A]` to the embeddings `[P + S, D]` of one branch."""
        start = self.prompt.prefix_tokens + 1
        # A causal LLM answers at a position as it answers at the end of what leads there.
        answers = [self.ask(prompt[: start + position].contiguous()) for position in self.prompt.readout_positions]
        for answer in answers:
            lacking = [word for word in self.words if word not in answer]
            if lacking:
                raise UserError(
                    f"the server returned no log-probability of {lacking[0]}; ask for {len(self.words)} of them, of "
                    "the folder that aullm-dist release split wrote"
                )
        return torch.tensor(
            [answer[word] - answer[NOTHING] for answer in answers for word in self.words if word != NOTHING]
        )


def load_served(folder: Path, ask: Ask) -> Release:
    """Load the client's part of a split release.

    Args:
        folder: `client/` of what `split_release` wrote.
        ask: sends prompts to the server.

    Raises:
        UserError: the folder is another one, or of a version with another AU graph.
    """
    if not (folder / PROMPT_FILE).is_file():
        raise UserError(f"{folder}: {PROMPT_FILE} is missing; allowed: client/ of what aullm-dist release split wrote")
    described = read_json(folder / CONFIG_FILE)
    aus = tuple(described["aus"])
    # Rows of the LLM are the server's: what would pack them, or put LoRA on them, has nothing to do here.
    config = from_dict(described["settings"], f"{folder / CONFIG_FILE}: settings")
    config = config.changed({"model.packing": False, "model.lora_rank": 0})
    relations = build_relations(aus) if config.model.structure else None
    known = None if relations is None else json.loads(json.dumps(relations.describe()))
    if known != described["function"]["relations"]:
        raise UserError(f"{folder}: is of a version with another AU graph; split the release again with that version")
    static = load_file(folder / PROMPT_FILE)["static"]
    values = load_file(folder / MODULES_FILE)
    prompt = _prompt(described, aus)
    width = static.shape[1]
    nothing: Any = None  # there is neither a tokenizer nor a config of an LLM here
    backbone = Backbone(
        model=_StaticEmbeddings(static),
        tokenizer=nothing,
        config=nothing,
        hidden_size=width,
        quantized_modules=(),
        reasons={},
    )
    # First values, of which the saved ones take the place.
    start: dict[str, Any] = {"scale": float(values["projector.scale.rms"]), "names": torch.zeros(len(aus), width)}
    model = assemble(config, backbone, prompt, relations, **start)
    reasoner = ServedReasoner(backbone, prompt, packing=False, amends=config.model.answer == "stages", **start)
    reasoner.ask, reasoner.words = ask, words_of(described)
    model.reasoner = reasoner
    plan = plan_tensors(model)
    SavedState({}, plan, {item.name: values[item.key] for item in plan}, {}).apply()
    return release_of(folder, described, model, config, "served", torch.device("cpu"))


def largest_difference(release: Release) -> float:
    """Answer the probe clips with the server, and return the largest difference of a logit from the release's own.

    Raises:
        UserError: no answers were recorded when the release was made.
    """
    if not (release.path / PROBE_FILE).is_file():
        raise UserError(f"{release.path}: the release has no recorded answers to compare with")
    recorded = read_probe(release.path)
    return float((answer_probe(release.model, recorded.clips) - recorded.logits).abs().max())


def _prompt(described: Mapping[str, Any], aus: tuple[int, ...]) -> Prompt:
    prompt, model = described["prompt"], described["settings"]["model"]
    return Prompt(
        aus=aus,
        readout=model["readout"],
        text=prompt["text"],
        prefix_ids=tuple(prompt["prefix_ids"]),
        structure_ids=tuple(prompt["structure_ids"]),
        question_ids=tuple(prompt["question_ids"]),
        name_ids=tuple(() for _ in aus),
        use_structure=model["structure"],
    )
