"""`aullm-dist merge CHECKPOINT --out DIR`: arguments and what is printed at the end."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path

from aullm_dist.errors import UserError

_BASES = ("nf4-exact", "bf16")
_DTYPES = ("bf16", "fp16", "fp32")
_MIB = 2**20


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a fold of a run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist, or be empty")
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


def run_merge(args: argparse.Namespace) -> int:
    """Merge a checkpoint and say what was written.

    Raises:
        UserError: See `merge_llm`.
    """
    from aullm_dist.planning.cluster import parse_size
    from aullm_dist.release.merge import DTYPES, MergeReceipt, merge_llm
    from aullm_dist.training.retention import find_checkpoint

    max_ram = parse_size(args.max_ram, "--max-ram")
    checkpoint = find_checkpoint(args.checkpoint)
    receipt: MergeReceipt = merge_llm(
        checkpoint,
        args.out,
        base=args.base,
        dtype=DTYPES[args.dtype],
        max_ram=max_ram,
        probe=_prompts(args.probe, checkpoint),
        llm=args.llm,
    )
    resumed = f" ({receipt.resumed_bytes / 1e9:.2f} GB of it before)" if receipt.resumed_bytes else ""
    print(
        f"written: {args.out}, {receipt.bytes / 1e9:.2f} GB{resumed} in {receipt.seconds:.0f} s, "
        f"{receipt.mb_per_second:.0f} MB/s, peak {receipt.peak_bytes / _MIB:.0f} MiB of {max_ram / _MIB:.0f}; "
        f"{receipt.merged} of {receipt.tensors} tensors merged in {receipt.dtype}, base {receipt.base}"
    )
    for name, error in (receipt.probe or {"relative_logit_error": {}})["relative_logit_error"].items():
        what = "the trained model in the run's own arithmetic" if name == "live" else f"merged, base {name}"
        print(f"relative logit error of {what}: {error:.2e}")
    return 0


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
