"""`aullm-dist config`: every setting with its default and meaning, or a run file checked and resolved."""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from pathlib import Path

import yaml

from aullm_dist.config import Config, find_config, load, load_strategy, to_dict


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist config`."""
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="run file, or the name of a shipped one, to check and print"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the run file")


def run_config(args: argparse.Namespace) -> int:
    """Print the settings, or the resolved run file, and return the exit code.

    Raises:
        UserError: the run file or an override cannot be used.
    """
    overrides = args.overrides
    if args.file and "=" in args.file and not Path(args.file).exists():
        args.file, overrides = None, [args.file, *overrides]
    if args.file is None and not overrides:
        sys.stdout.write(describe_settings())
    else:
        config = load(find_config(args.file) if args.file else None, overrides)
        load_strategy(config.training.strategy).resolved(config.training, config.training.processes or 1)
        sys.stdout.write(yaml.safe_dump(to_dict(config), sort_keys=False))
    return 0


def describe_settings() -> str:
    """Return every setting as `group.key = default` with its type and documentation."""
    lines = []
    for group in dataclasses.fields(Config):
        group_class = group.type
        lines.append(f"{group.name}: {inspect.getdoc(group_class)}")
        documents = _attribute_documents(group_class)
        for field, default in zip(dataclasses.fields(group_class), dataclasses.astuple(group_class()), strict=True):
            kind = _type_name(field.type)
            shown = yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
            lines.append(f"  {group.name}.{field.name} = {shown}   ({kind})")
            if field.name in documents:
                text = textwrap.fill(documents[field.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
                lines.append(text)
        lines.append("")
    return "\n".join(lines)


def _type_name(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return name.replace("None", "null")


def _attribute_documents(group_class: type) -> dict[str, str]:
    """Read the strings that stand under the fields in the source, where they are written once."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(group_class))).body
    documents = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            documents[statement.target.id] = " ".join(following.value.value.split())
    return documents
