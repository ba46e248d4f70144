"""Counts the tokens of the run's prompt, by its tokenizer where that is at hand."""

import math
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.config import Config
from aullm_dist.data.clips import read_samples
from aullm_dist.data.corpora import corpus_names, get_drawable
from aullm_dist.data.protocols import au_vocabulary
from aullm_dist.data.records import read_report
from aullm_dist.errors import UserError
from aullm_dist.files import user_path
from aullm_dist.llm.stored.gguf_file import gguf_tokenizer
from aullm_dist.llm.stored.smollm2 import SMOLLM2, packaged_file
from aullm_dist.model.prompt import Prompt, Tokenizer, build_prompt
from aullm_dist.planning.skeleton import prompt_of_size
from aullm_dist.wording import QUESTION_TEXT, STRUCTURE_TEXT, prefix_text

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
    folders = [user_path(folder) for folder in (*data.train, *data.test)]
    if folders:
        corpora = sorted({corpus for folder in folders for corpus in _corpora_of(folder)})
    else:
        corpora = [get_drawable(data.synthetic_corpus, "data.synthetic_corpus").name]
    return au_vocabulary(corpora, data.protocol), ", ".join(corpora)


def _corpora_of(folder: Path) -> set[str]:
    """Return the corpora of a prepared dataset; of one that is not there yet, what its name says.

    Raises:
        UserError: the dataset is damaged, or the folder's name begins with no corpus.
    """
    if report := read_report(folder):
        return {report["corpus"]}
    if folder.is_dir() and any(folder.iterdir()):
        return {sample.corpus for sample in read_samples([folder])}
    # The longest name counts: casme2 and casme3a begin with casme too.
    names = [name for name in corpus_names() if folder.name.startswith(name)]
    if not names:
        raise UserError(
            f"data: the corpus of {folder.name!r} is not known from its name; allowed: folders that exist or begin "
            f"with {', '.join(corpus_names())}, or the AUs in data.aus=[...]"
        )
    return {max(names, key=len)}


def _tokenizer(config: Config) -> Tokenizer | None:
    model = config.model
    if model.llm == "tiny":
        from aullm_dist.llm.tiny import tiny_parts

        return tiny_parts(model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers)[1]
    if model.llm == SMOLLM2:
        return gguf_tokenizer(packaged_file())
    folder = user_path(model.llm)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from aullm_dist.llm.files import load_tokenizer

    return load_tokenizer(str(folder), {"trust_remote_code": model.trust_remote_code, "local_files_only": True})
