"""`aullm-dist merge CHECKPOINT --out DIR`: arguments and what is printed at the end."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aullm_dist.release.merge import MergeReceipt

_BASES = ("nf4-exact", "bf16")
_DTYPES = ("bf16", "fp16", "fp32")
_MIB = 2**20


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a fold of a run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist, or be empty")
    add("--format", choices=("merged", "adapter", "llm"), default="merged",
        help="merged: a release folder with an LLM of its own; adapter: one with LoRA beside its LLM; llm: the merged "
        "LLM alone (%(default)s)")  # fmt: skip
    add("--max-ram", default="4GiB", metavar="SIZE",
        help="memory that the merge may take above what the libraries take (4GiB)")  # fmt: skip
    add(
        "--base",
        choices=_BASES,
        help="add LoRA to the weights as NF4 has them, or to the original ones (default: as trained)",
    )
    add("--dtype", choices=_DTYPES, default="bf16", help="of the new weights (%(default)s)")
    add("--llm", type=Path, metavar="DIR", help="where the LLM is, if it is not where the run found it")
    add("--probe", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="measure the errors of both bases on prompts, one per line of FILE (default: the run's own prompt); reads "
        "the LLM several times over")  # fmt: skip
    add("--scores", type=Path, metavar="RUN",
        help="run whose held-out scores go onto the card of a release (default: the checkpoint's own)")  # fmt: skip
    add("--author", action="append", default=[], metavar="NAME",
        help="a name for the CITATION.cff of a release; may be given several times")  # fmt: skip


def run_merge(args: argparse.Namespace) -> int:
    """Merge a checkpoint and say what was written.

    Raises:
        UserError: See `merge_llm`, and for release folders `folder.export`.
    """
    from aullm_dist.planning.cluster import parse_size
    from aullm_dist.release.merge import DTYPES, merge_llm
    from aullm_dist.training.retention import find_checkpoint

    if args.format == "llm" and (args.scores or args.author):
        raise UserError("--format llm: has no card and no citation for --scores and --author; allowed: merged, adapter")
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
    from aullm_dist.release.folder import export

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
        scores=args.scores,
        authors=args.author,
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
    from aullm_dist.model.llm_files import local_folder
    from aullm_dist.training.manifest import read_manifest

    base = read_manifest(checkpoint)["base"]
    if base is None:
        return True
    folder = local_folder(llm or base["name"])
    return 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= max_ram


def _prompts(file: Path | None, checkpoint: Path) -> list[str] | None:
    """Return the prompts of a probe, None for no probe."""
    import json

    from aullm_dist.training.checkpoint import MODULES_CONFIG_FILE

    if file is None:
        return None
    if file == Path():
        return [json.loads((checkpoint / MODULES_CONFIG_FILE).read_bytes())["prompt"]]
    try:
        prompts = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--probe {file}: cannot be read; allowed: a text file with a prompt per line") from error
    if not prompts:
        raise UserError(f"--probe {file}: holds no prompt; allowed: a text file with a prompt per line")
    return prompts
