"""Table of every causal LM type that transformers knows: padded, packed, LoRA, NF4, merged, each yes or refused.

    python benchmarks/backbones.py [--out docs/backbones.md] [--only TYPE ... [--update]] [--seconds 90]

Each type's default config, completed where the library's own defaults cannot be built, is cut to tiny size by the probe
(`packing/shrink.py`) and goes through what a run asks of it (`backbone_cells.py`): rows of embeddings with gradients,
packed against padded hidden states and gradients, then a base on disk, loaded with LoRA on all linear layers, trained,
merged and loaded again by the library alone; and the same in NF4. No weights are downloaded. `--only` prints rows
instead of writing the file, and `--update` puts them into it, in the place of its own.
"""

import argparse
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType

import torch
import transformers
from backbone_cells import COLUMNS, YES, alone, cells_of, refused
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from aullm_dist.errors import UserError
from aullm_dist.library_errors import LIBRARY_ERRORS
from aullm_dist.llm.stored.wrappers import text_decoder_of


class Late(BaseException):
    """A type took longer than it may."""


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/backbones.md"))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--update", action="store_true", help="write the rows of --only into the file")
    parser.add_argument("--seconds", type=int, default=90, help="of computing for one type")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    # Computing alone counts: a busy machine has the same table.
    signal.signal(signal.SIGPROF, _late)
    rows = []
    for name in options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.monotonic()
        rows.append(_row(name, options.seconds))
        print(" | ".join(rows[-1]), f"({time.monotonic() - started:.1f} s)", flush=True)
    if options.update:
        there = {row[0]: row for row in _rows_of(options.out)} | {row[0]: row for row in rows}
        rows = [there[name] for name in sorted(there, key=lambda name: name.strip("`"))]
    if options.update or not options.only:
        options.out.write_text(_page(rows), encoding="utf-8")
    return 0


def _rows_of(page: Path) -> list[list[str]]:
    """Return the rows of a page that was written before."""
    lines = page.read_text(encoding="utf-8").partition("## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]


def _late(number: int, frame: FrameType | None) -> None:
    raise Late


def _row(name: str, seconds: int) -> list[str]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return [f"`{name}`", *cells_of(name)]
    except Late:
        return [f"`{name}`", *alone(refused(f"takes more than {seconds} s at its smallest"))]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _wrappers() -> list[tuple[str, str]]:
    """Return every multimodal model type whose text decoder is a causal LM, with the type of that."""
    found = []
    for name in sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        try:
            config = CONFIG_MAPPING[name]()
            text = text_decoder_of(name, config)
        except (*LIBRARY_ERRORS, UserError):
            continue
        if text is not config and not config.is_encoder_decoder:
            found.append((name, text.model_type))
    return found


def _page(rows: list[list[str]]) -> str:
    packed = sum(row[2].startswith(YES) for row in rows)
    lines = [
        "# Backbones",
        "",
        f"Written by `python benchmarks/backbones.py` with transformers {transformers.__version__} and torch",
        f"{torch.__version__}; do not edit. Each type that transformers knows as a causal LM, at tiny size with random",
        "weights: `padded` runs rows of embeddings, `packed` the shared prefix (in brackets the largest deviation of",
        "hidden states and gradients from padded rows). `LoRA` loads a base from files and trains an adapter on all",
        "linear layers, packed where the type packs; `idle` are layers that no gradient reaches, whose LoRA is left",
        "out of the training. `merge` is `aullm-dist merge` of that adapter in float32, loaded by transformers alone",
        "(in brackets the deviation of its logits from the trained model's; 1e-04 is allowed). `NF4` and `merge of",
        "NF4` are the same with the linear layers in 4 bits, merged onto the weights as NF4 has them. A refusal stands",
        "where it is met first; `-` is what it rules out as well. One over `rows of N weights` is of the tiny size:",
        "released models of the type have wider rows. A run tries its own config in the same way",
        f"([model.md](model.md#the-packed-step)). {packed} of {len(rows)} types run packed.",
        *(
            ["`fails` marks what no check refuses yet."]
            if any("fails:" in cell for row in rows for cell in row)
            else []
        ),
        "What rounding does to a trained LLM is in [model.md](model.md#the-llm-llmbackbonepy).",
        "",
        f"| type | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "## Multimodal models",
        "",
        "Their text decoder is trained from their own files ([model.md](model.md#the-llm-llmbackbonepy)). The",
        "decoder named here is that of the library's default config; a checkpoint's own config decides.",
        "",
        "| type | text decoder |",
        "|---|---|",
        *(f"| `{name}` | `{text}` |" for name, text in _wrappers()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
