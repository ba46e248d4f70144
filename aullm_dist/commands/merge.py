"""Runs `aullm-dist merge CHECKPOINT --out DIR`: reads the arguments, and prints what was written."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.commands.options import show_example
from aullm_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aullm_dist.merge.merge import MergeReceipt

_BASES = ("nf4-exact", "bf16")
_DTYPES = ("bf16", "fp16", "fp32")
_MIB = 2**20
_PROBE = "allowed: a text file with a prompt per line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    show_example(parser, "aullm-dist merge runs/casme2_loso/fold-00 --out release")
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a fold of a run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist, or be empty")
    add("--format", choices=("merged", "adapter", "llm"), default="merged",
        help="merged: a release folder with an LLM of its own; adapter: one with LoRA next to its LLM; llm: the "
        "merged LLM alone (default: %(default)s)")  # fmt: skip
    add("--max-ram", default="4GiB", metavar="SIZE",
        help="memory that the merge may take above what the libraries take (default: %(default)s)")  # fmt: skip
    add(
        "--base",
        choices=_BASES,
        help="add LoRA to the weights as NF4 has them, or to the original ones (default: as trained)",
    )
    add("--dtype", choices=_DTYPES, default="bf16", help="type of the new weights (default: %(default)s)")
    add("--llm", type=Path, metavar="DIR", help="where the LLM is, if it is not where the run found it")
    add("--probe", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="measure the errors of both bases on prompts, one per line of FILE, without FILE on the run's own prompt; "
        "reads the LLM several times over")  # fmt: skip
    add("--scores", type=Path, metavar="RUN",
        help="run whose held-out scores go onto the card of a release (default: the checkpoint's own)")  # fmt: skip
    add("--author", action="append", default=[], metavar="NAME",
        help="a name for the CITATION.cff of a release; repeatable")  # fmt: skip
    add("--benchmark", type=_dataset_id, metavar="ORG/DATASET",
        help="dataset of the Hugging Face Hub whose leaderboard is to show the scores (default: none, the corpora are "
        "named)")  # fmt: skip


def _dataset_id(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: the id of a dataset on the Hub, ORG/DATASET")
    return text


def run(args: argparse.Namespace) -> int:
    """Merge a checkpoint and say what was written.

    Raises:
        UserError: See `merge_llm`, and for release folders `folder.export`.
    """
    from aullm_dist.checkpoint.retention import find_checkpoint
    from aullm_dist.merge.merge import DTYPES, merge_llm
    from aullm_dist.planning.cluster import parse_size

    if args.format == "llm" and (args.scores or args.author or args.benchmark):
        raise UserError(
            "--format llm: has no card and no citation for --scores, --author and --benchmark; allowed: merged, adapter"
        )
    max_ram = parse_size(args.max_ram, "--max-ram")
    checkpoint = find_checkpoint(args.checkpoint)
    merge = functools.partial(
        merge_llm,
        checkpoint,
        base=args.base,
        dtype=DTYPES[args.dtype],
        max_ram=max_ram,
        probe=_prompts(args.probe, checkpoint),
        llm=args.llm,
        # A release folder is written elsewhere at first; what a kill leaves must be found again.
        partial=args.out.with_name(f"{args.out.name}.partial"),
    )
    if args.format == "llm":
        _describe(args.out, merge(args.out))
        return 0
    from aullm_dist.release.export import CardOptions, export

    record = _fits(checkpoint, args.llm, max_ram)
    if not record:
        print(
            "the answers to the probe clips are not recorded: the LLM does not fit into --max-ram twice over; "
            "`release verify` will compare files alone"
        )
    llm = None if args.llm is None else str(args.llm)
    merged = args.format == "merged"
    export(
        checkpoint,
        args.out,
        format=args.format,
        merge=_told(merge) if merged else None,
        llm=llm,
        record=record,
        card=CardOptions(scores=args.scores, authors=args.author, benchmark=args.benchmark),
    )
    print(f"written: {args.out}")
    return 0


def _told(merge: "Callable[[Path], MergeReceipt]") -> "Callable[[Path], MergeReceipt]":
    def tell(out: Path) -> "MergeReceipt":
        receipt = merge(out)
        _describe(Path(out.name), receipt)
        return receipt

    return tell


def _describe(out: Path, receipt: "MergeReceipt") -> None:
    resumed = f" ({receipt.resumed_bytes / 1e9:.2f} GB of it before)" if receipt.resumed_bytes else ""
    print(
        f"merged: {out}, {receipt.bytes / 1e9:.2f} GB{resumed} in {receipt.seconds:.0f} s, "
        f"{receipt.mb_per_second:.0f} MB/s, peak {receipt.peak_bytes / _MIB:.0f} MiB "
        f"of {receipt.max_ram_bytes / _MIB:.0f}\n"
        f"{receipt.merged} of {receipt.tensors} tensors merged in {receipt.dtype}, base {receipt.base}"
    )
    print(f"{receipt.note}")
    for name, error in (receipt.probe or {"relative_logit_error": {}})["relative_logit_error"].items():
        what = "the trained model in the run's own arithmetic" if name == "live" else f"merged, base {name}"
        print(f"relative logit error of {what}: {error:.2e}")


def _fits(checkpoint: Path, llm: Path | None, max_ram: int) -> bool:
    """Return whether the LLM may be held whole: twice what its files take, as float32 takes twice of bf16."""
    from aullm_dist.checkpoint.manifest import read_manifest
    from aullm_dist.llm.files import local_folder
    from aullm_dist.runs.recorded import find_base

    manifest = read_manifest(checkpoint)
    if manifest.base is None:
        return True
    folder = local_folder(llm or find_base(manifest.base, manifest.config, checkpoint))
    return 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= max_ram


def _prompts(file: Path | None, checkpoint: Path) -> list[str] | None:
    """Return the prompts of a probe, None for no probe."""
    from aullm_dist.checkpoint.store import MODULES_CONFIG_FILE
    from aullm_dist.files import read_json, read_text

    if file is None:
        return None
    if file == Path():
        return [read_json(checkpoint / MODULES_CONFIG_FILE, keys=("prompt",))["prompt"]]
    prompts = [line for line in read_text(file, f"--probe: {_PROBE}").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--probe {file}: holds no prompt; {_PROBE}")
    return prompts
