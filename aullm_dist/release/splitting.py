"""Splits a merged release in two: an LLM for a server of LLMs, and what a client needs to ask it.

A server of LLMs returns log-probabilities of its vocabulary and no hidden states. So the head that reads the AUs
takes the place of the vocabulary: one word for each row of the head and one, `NOTHING`, whose logit is 0. The logit of
a row is then the difference of two log-probabilities. Words are never looked up: prompts come as embeddings.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from aullm_dist.checkpoint.tensor_plan import MODULES_FILE
from aullm_dist.errors import UserError
from aullm_dist.files import is_new_or_empty, read_json, staged_folder
from aullm_dist.release.layout import CONFIG_FILE, LLM_FOLDER, PROBE_FILE, check_files, read_release_manifest

SERVER_FOLDER = "server"
CLIENT_FOLDER = "client"
PROMPT_FILE = "prompt.safetensors"
NOTHING = "nothing"
_INDEX = "model.safetensors.index.json"
_HEAD = "reasoner.au_head.weight"
# Keys of a config that change logits on their way out, with the value that changes nothing.
_NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
_NO_WORDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def words_of(described: Mapping[str, Any]) -> list[str]:
    """Return the served LLM's vocabulary in the order of its ids, `NOTHING` last.

    Args:
        described: config.json of the release.
    """
    rows = [f"AU{au}" for au in described["aus"]] if described["settings"]["model"]["readout"] == "last" else ["active"]
    return [*rows, NOTHING]


def split_release(release: Path, out: Path) -> None:
    """Write `server/`, a model that servers of LLMs load, and `client/`, for `served.load_served`.

    At most one weight file of the LLM is in memory at a time.

    Args:
        release: a merged release.
        out: the folder to be made; it may exist if it is empty.

    Raises:
        UserError: it is no merged release, it was altered, `out` is taken, or the LLM has no linear head of its own.
    """
    manifest = read_release_manifest(release)
    if manifest.release_format != "merged":
        raise UserError(
            f"{release}: is an {manifest.release_format} release, whose LLM has no LoRA in it; "
            "allowed: a merged release (aullm-dist merge --format merged)"
        )
    if not is_new_or_empty(out):
        raise UserError(f"{out}: is taken; give a new or an empty folder")
    check_files(release, manifest, every_byte=False)
    described = read_json(release / CONFIG_FILE)
    embedding, head, has_bias = _ends(release / LLM_FOLDER)
    ours = load_file(release / MODULES_FILE)
    try:
        with staged_folder(out) as folder:
            for name in (SERVER_FOLDER, CLIENT_FOLDER):
                (folder / name).mkdir()
            static = _rows(release / LLM_FOLDER, embedding, _static_ids(described["prompt"]))
            rows = torch.cat([ours[_HEAD], torch.zeros_like(ours[_HEAD][:1])]).to(static.dtype)
            replaced = {f"{embedding}.weight": torch.zeros_like(rows), f"{head}.weight": rows}
            if has_bias:
                replaced[f"{head}.bias"] = torch.zeros(len(rows), dtype=rows.dtype)
            _write_weights(release / LLM_FOLDER, folder / SERVER_FOLDER, replaced)
            _write_config(release / LLM_FOLDER, folder / SERVER_FOLDER, len(rows))
            _write_tokenizer(folder / SERVER_FOLDER, words_of(described))
            for name in (CONFIG_FILE, MODULES_FILE, PROBE_FILE):
                if (release / name).exists():
                    shutil.copyfile(release / name, folder / CLIENT_FOLDER / name)
            save_file({"static": static}, folder / CLIENT_FOLDER / PROMPT_FILE)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); give a folder that you may write") from error


def _static_ids(prompt: Mapping[str, Any]) -> list[int]:
    return [*prompt["prefix_ids"], *prompt["structure_ids"], *prompt["question_ids"]]


def _ends(llm: Path) -> tuple[str, str, bool]:
    """Return the names of an LLM's embeddings and of its head, and whether the head has a bias."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm))
    found = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not isinstance(embedding, torch.nn.Embedding):
        raise UserError(f"{llm}: is a {model.config.model_type}, whose head is no linear layer; it cannot be served so")
    return found[id(embedding)], found[id(head)], head.bias is not None


def _weight_map(llm: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    if (llm / _INDEX).exists():
        weights: dict[str, str] = read_json(llm / _INDEX)["weight_map"]
        return weights
    (path,) = llm.glob("*.safetensors")
    with safe_open(path, framework="pt") as stored:
        return dict.fromkeys(stored.keys(), path.name)


def _rows(llm: Path, embedding: str, ids: list[int]) -> Tensor:
    name = f"{embedding}.weight"
    with safe_open(llm / _weight_map(llm)[name], framework="pt") as stored:
        table = stored.get_slice(name)
        return torch.cat([table[i : i + 1] for i in ids])


def _write_weights(source: Path, target: Path, replaced: Mapping[str, Tensor]) -> None:
    """Copy weight files with some tensors replaced; what a tied LLM does not have goes into the first file."""
    where = _weight_map(source)
    files = sorted(set(where.values()))
    placed = {name: where.get(name, files[0]) for name in replaced}
    for file in files:
        here = {name: replaced[name].contiguous() for name, its in placed.items() if its == file}
        if here:
            save_file(load_file(source / file) | here, target / file, metadata={"format": "pt"})
        else:
            shutil.copyfile(source / file, target / file)
    if len(files) > 1:
        size = sum((target / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted((where | placed).items()))}
        (target / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_config(source: Path, target: Path, words: int) -> None:
    config = read_json(source / CONFIG_FILE)
    neutral = {key: value for key, value in _NEUTRAL.items() if key in config}
    config |= {"vocab_size": words, "tie_word_embeddings": False, **dict.fromkeys(_NO_WORDS), **neutral}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _write_tokenizer(target: Path, words: list[str]) -> None:
    vocabulary = {word: number for number, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=NOTHING))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=NOTHING).save_pretrained(target)
