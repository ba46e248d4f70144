"""How many tokens the run's prompt has, from its tokenizer where that is at hand."""

import math
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.config import Config
from aullm_dist.data.protocols import au_vocabulary
from aullm_dist.errors import UserError
from aullm_dist.facs import AU_SETS
from aullm_dist.model.prompt import QUESTION_TEXT, STRUCTURE_TEXT, Prompt, build_prompt, prefix_text
from aullm_dist.planning.skeleton import prompt_of_size

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English in byte-pair vocabularies; rounded up."""


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt, and what was assumed of it."""

    prompt: Prompt
    assumption: str


def plan_prompt(config: Config, prefix: int | None = None, suffix: int | None = None) -> PlannedPrompt:
    """Return the prompt of a run, or one of the right lengths.

    Args:
        config: the run's configuration.
        prefix: tokens shared by all branches; None counts or estimates them.
        suffix: tokens of one branch; None counts or estimates them.

    Raises:
        UserError: the AUs are not known, or the tokenizer cannot be used.
    """
    aus, corpora = _aus(config)
    readout, structure = config.model.readout, config.model.structure
    if prefix is None or suffix is None:
        tokenizer = _tokenizer(config)
        if tokenizer is not None and prefix is None and suffix is None:
            prompt = build_prompt(aus, tokenizer, readout=readout, use_structure=structure)
            return PlannedPrompt(prompt, f"prompt of {len(aus)} AUs ({corpora}), counted by the LLM's tokenizer")
        text = prefix_text(aus, use_structure=structure)
        questions = (STRUCTURE_TEXT if structure else "", QUESTION_TEXT)
        soft = 1 + structure + (len(aus) if readout == "per_au" else 0)
        estimate = soft + sum(math.ceil(len(part) / CHARACTERS_PER_TOKEN) for part in questions)
        prefix = prefix or 1 + math.ceil(len(text) / CHARACTERS_PER_TOKEN)
        suffix = suffix or estimate
        how = f"no tokenizer at hand: a token for {CHARACTERS_PER_TOKEN} characters (--prefix-tokens, --suffix-tokens)"
    else:
        how = "as given"
    prompt = prompt_of_size(aus, prefix, suffix, readout, structure)
    return PlannedPrompt(prompt, f"prompt of {len(aus)} AUs ({corpora}), {how}")


def _aus(config: Config) -> tuple[tuple[int, ...], str]:
    data = config.data
    if data.aus:
        return tuple(data.aus), "data.aus"
    folders = [Path(folder).name for folder in (*data.train, *data.test)] or [data.synthetic_corpus]
    known = [next((name for name in AU_SETS if folder.startswith(name)), None) for folder in folders]
    if None in known:
        folder = folders[known.index(None)]
        raise UserError(
            f"data: the corpus of {folder!r} is not known from its name; allowed: folders that begin with "
            f"{', '.join(AU_SETS)}, or the AUs in data.aus=[...]"
        )
    corpora = sorted(set(known))
    return au_vocabulary(corpora, data.protocol), ", ".join(corpora)


def _tokenizer(config: Config) -> object | None:
    model = config.model
    if model.llm == "tiny":
        from aullm_dist.model.tiny import tiny_parts

        return tiny_parts(model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers)[1]
    folder = Path(model.llm).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from aullm_dist.model.llm_files import load_tokenizer

    return load_tokenizer(str(folder), {"trust_remote_code": model.trust_remote_code, "local_files_only": True})
