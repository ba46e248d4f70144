"""Builds a tiny backbone with its own tokenizer, on which the demo, the benchmarks and the tests run.

The weights are random: the backbone knows no language, so nothing measured with it says what an LLM brings. What it
shares with a real one is the architecture, the files on disk and every code path.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES, CROSS_AUS, au_name
from aullm_dist.quiet import hidden_progress_bars
from aullm_dist.wording import QUESTION_TEXT, STRUCTURE_TEXT, prefix_text

Architecture = Literal["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
WINDOW = 32
"""Positions that a sliding layer sees: fewer than the prompt has, so that a window left out is noticed."""
_WITHOUT_BOS = ("qwen2", "qwen3")
RECIPE_FILE = "tiny_backbone.json"
_FILES = (RECIPE_FILE, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_RECIPE_VERSION = 1


def is_tiny(llm: str) -> bool:
    """Whether an LLM, by setting, folder or Hugging Face name, is a tiny backbone, whose weights are random."""
    return llm == "tiny" or (Path(llm) / RECIPE_FILE).is_file()


def build_tiny_backbone(
    folder: str | os.PathLike,
    *,
    architecture: Architecture = "llama",
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    vocab: int = 1024,
    seed: int = 0,
) -> Path:
    """Build a tiny backbone in `folder` and return its path; a folder that already holds the same one is kept as it is.

    The files are written to a temporary folder next to `folder` and renamed, so that several processes may ask at once.

    Args:
        folder: where config, safetensors weights and tokenizer go.
        architecture: one of `ARCHITECTURES`. Layers slide where those of the released model do, over `WINDOW`
            positions: all of Mistral's (as in its version 0.1), every other one of Gemma 2's, and all of Gemma 3's but
            every sixth and the last.
        hidden: LLM width D, a multiple of `2 * heads`.
        layers: number of decoder layers.
        heads: attention heads; half as many key-value heads where `heads` is even, so that queries share them.
        vocab: upper bound of the vocabulary, 300 to 1024 ids.
        seed: seed of the weights.

    Raises:
        UserError: impossible sizes, or `folder` holds something that is no tiny backbone.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"tiny backbone: architecture is {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    if hidden < 1 or layers < 1 or heads < 1 or hidden % (2 * heads) or not 300 <= vocab <= 1024:
        raise UserError(
            f"tiny backbone: hidden={hidden} layers={layers} heads={heads} vocab={vocab}; "
            "allowed: positive sizes, hidden a multiple of 2 * heads, vocab 300 to 1024"
        )
    folder = Path(folder)
    recipe = {
        "recipe_version": _RECIPE_VERSION,
        "architecture": architecture,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "vocab": vocab,
        "seed": seed,
        "text": list(_training_text()),
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    if _holds(folder, recipe):
        return folder
    if folder.exists() and not (folder / RECIPE_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"tiny backbone: {folder} holds something else; allowed: a new or empty folder, or a tiny backbone"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "backbone"
        _write(made, recipe)
        _replace(made, folder, Path(scratch) / "old", recipe)
    return folder


def tiny_parts(
    architecture: Architecture = "llama", *, hidden: int = 128, layers: int = 4, heads: int = 4, vocab: int = 1024
) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Return config and tokenizer of the backbone that `build_tiny_backbone` would write, without its weights."""
    recipe = {
        "architecture": architecture,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "vocab": vocab,
        "text": list(_training_text()),
    }
    tokenizer = _train_tokenizer(recipe)
    return _config(recipe, tokenizer), tokenizer


# Fixed: one more corpus must not change the tokens, and with them the weights, of the backbones that exist.
_TEXT_SETS = ((1, 2, 4, 7, 12, 14, 15, 17), (2, 4, 7, 12), (1, 2, 4, 6, 7, 12, 17, 45), CROSS_AUS)


def _training_text() -> Iterator[str]:
    for aus in _TEXT_SETS:
        for use_structure in (True, False):
            yield prefix_text(aus, use_structure=use_structure)
    yield STRUCTURE_TEXT + QUESTION_TEXT
    yield from (au_name(au) for au in AU_NAMES)


def _holds(folder: Path, recipe: dict) -> bool:
    if not all((folder / name).is_file() for name in _FILES):
        return False
    try:
        return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")) == recipe
    except ValueError:
        return False


def _replace(made: Path, folder: Path, old: Path, recipe: dict) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
    except OSError:
        # Another process renamed its own in between: the same recipe gives the same files.
        if not _holds(folder, recipe):
            raise
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, recipe: dict) -> None:
    tokenizer = _train_tokenizer(recipe)
    config = _config(recipe, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe["seed"])
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Fresh biases (Qwen2's) are zero, which would hide one that got lost.
            if name.endswith(".bias"):
                parameter.data.normal_(std=0.1)
    with hidden_progress_bars():
        model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def _config(recipe: dict, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    hidden, heads, layers = recipe["hidden"], recipe["heads"], recipe["layers"]
    model_type, own = _own_settings(recipe["architecture"], layers, head_dim=hidden // heads)
    config: Callable[..., PretrainedConfig] = CONFIG_MAPPING[model_type]
    return config(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=hidden // heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        # The usual 0.02 fits wide models; at this width it would leave the residual branches without effect.
        initializer_range=hidden**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **own,
    )


def _own_settings(architecture: str, layers: int, head_dim: int) -> tuple[str, dict]:
    """Return the model type of an architecture and the settings that only it has.

    Source: config.json of Mistral-7B-v0.1, gemma-2-9b and gemma-3-1b for which layers slide; the released Qwen2 and
    Qwen3 have `use_sliding_window: false`.
    """
    if architecture == "mistral":
        return "mistral", {"sliding_window": WINDOW}
    if architecture not in ("gemma2", "gemma3"):
        return architecture, {}
    gemma = {"query_pre_attn_scalar": head_dim, "sliding_window": WINDOW}
    if architecture == "gemma2":
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        # The released cap of 50 would leave the small scores of random weights as they are; 1 bends them.
        caps = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 30.0}
        return "gemma2", gemma | caps | {"layer_types": types}
    # Fewer layers than six would have no full one; a single layer slides, as the first of the released model does.
    full = {*range(5, layers, 6)} | ({layers - 1} - {0})
    types = ["full_attention" if layer in full else "sliding_attention" for layer in range(layers)]
    return "gemma3_text", gemma | {"layer_types": types}


def _train_tokenizer(recipe: dict) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; like the real ones it begins a text with BOS, but Qwen's, which has none."""
    with_bos = recipe["architecture"] not in _WITHOUT_BOS
    special = ["<pad>", "</s>", "<s>"] if with_bos else ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe["vocab"],
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(recipe["text"], trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if with_bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
