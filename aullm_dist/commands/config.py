"""Runs `aullm-dist config`: prints every setting with its default and meaning, or checks and resolves a run file."""

import argparse
import json
import sys
import textwrap
import typing
from pathlib import Path

import yaml

from aullm_dist.commands.options import show_example
from aullm_dist.config import differing, find_config, load, load_strategy, refuse_other_sharding, to_dict
from aullm_dist.config.allowed import is_nullable, is_union
from aullm_dist.config.json_schema import json_schema
from aullm_dist.config.loader import plain
from aullm_dist.config.schema import Setting, group_documents, settings
from aullm_dist.data.corpora import get_drawable
from aullm_dist.errors import UserError

_LEGEND = """\
Each setting: its default, then its type, what it changes (the function that is learnt, the data, the execution, or the
output), and where it may have another value than the run had: at a resume, in a prediction of a checkpoint or of a
release, between the runs of an ablation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist config`."""
    show_example(parser, "aullm-dist config casme2_loso training.epochs=60")
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="run file, or the name of a shipped one, to check and print"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the run file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--changed", action="store_true", help="print only what differs from the defaults")
    what.add_argument("--schema", action="store_true", help="print the JSON Schema of run files, for editors")


def run(args: argparse.Namespace) -> int:
    """Print the settings, their JSON Schema or the resolved run file, and return the exit code.

    Raises:
        UserError: the run file or an override cannot be used.
    """
    given = [*([args.file] if args.file else []), *args.overrides]
    # Behind an option argparse leaves the run file among the overrides.
    file = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).exists()) else None
    if args.schema:
        if file or given:
            raise UserError("--schema prints what holds for all run files; give it alone")
        sys.stdout.write(schema_text())
    elif file is None and not given and not args.changed:
        sys.stdout.write(describe_settings())
    else:
        config = load(find_config(file) if file else None, given)
        get_drawable(config.data.synthetic_corpus, "data.synthetic_corpus")
        strategy = load_strategy(config.training.strategy)
        refuse_other_sharding(strategy, config.training)
        if config.training.folds_at_once == 1:
            strategy.resolved(config.training, config.training.processes or 1)
        sys.stdout.write(yaml.safe_dump(differing(config) if args.changed else to_dict(config), sort_keys=False))
    return 0


def schema_text() -> str:
    """Return the JSON Schema of run files as it is shipped."""
    return json.dumps(json_schema(), indent=1) + "\n"


def describe_settings() -> str:
    """Return every setting as `group.key = default`, with its type, what it changes, its meaning and its bounds."""
    lines = [_LEGEND]
    for group, document in group_documents().items():
        lines.append(f"{group}: {document}")
        for setting in settings():
            if setting.group == group:
                lines += _described(setting)
        lines.append("")
    return "\n".join(lines)


def _described(setting: Setting) -> list[str]:
    about = setting.about
    shown = yaml.safe_dump(plain(setting.default), default_flow_style=True).splitlines()[0]
    marks = [_type_name(setting.kind), about.affects]
    if about.may_differ:
        marks.append(f"may differ: {', '.join(about.may_differ)}")
    text = about.meaning
    if about.allowed is not None:
        text += f" Allowed: {about.allowed.words(is_nullable(setting.kind))}."
    indent = " " * 6
    return [
        f"  {setting.name} = {shown}   ({'; '.join(marks)})",
        textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent),
    ]


def _type_name(kind: typing.Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    if is_union(kind) and any(typing.get_origin(k) is typing.Literal for k in typing.get_args(kind)):
        return " | ".join(_type_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list[{typing.get_args(kind)[0].__name__}]"
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return name.replace("None", "null").replace("typing.", "")
