"""Runs `aullm-dist completion SHELL`: prints what makes a shell complete commands, options, settings and paths."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aullm_dist.commands.options import show_example

SHELLS = ("bash", "zsh")
_WHERE = """\
bash reads the script in ~/.local/share/bash-completion/completions/aullm-dist, zsh in DIR/_aullm-dist, where DIR is a
folder of $fpath.

"""
_EXAMPLE = "aullm-dist completion bash > ~/.local/share/bash-completion/completions/aullm-dist"
_RUN_FILES = ("config", "file")
_PATHS = ("inputs", "runs")
"""Arguments that take paths and whose type does not say so."""
_FUNCTIONS = {
    # In bash an optional run file keeps the place of the settings behind it, so both are offered there.
    "bash": """\
_aullm_dist_settings() {{
  compgen -W '{settings}' -- "$1"
}}
_aullm_dist_run_files() {{
  compgen -W '{run_files} {settings}' -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": """\
_aullm_dist_settings() {{
  local -a settings=({settings})
  compadd -S '' -a settings
}}
_aullm_dist_run_files() {{
  local -a run_files=({run_files})
  compadd -a run_files
  _files
}}
""",
}
_ENDS = {
    # No blank behind `training.epochs=`.
    "bash": """\
_aullm_dist() {
  _shtab_aullm_dist "$@"
  [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -F _aullm_dist aullm-dist
""",
    "zsh": "",
}
_SETTINGS = dict.fromkeys(SHELLS, "_aullm_dist_settings")
_RUN_FILE = dict.fromkeys(SHELLS, "_aullm_dist_run_files")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist completion`."""
    show_example(parser, _EXAMPLE, _WHERE)
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    """Print the script of `args.shell` for `args.whole_parser`, and return the exit code."""
    import shtab

    from aullm_dist.config.schema import settings
    from aullm_dist.config.shipped import shipped_names

    parser: argparse.ArgumentParser = args.whole_parser
    for action in _actions(parser):
        completion = _completion(action, shtab.FILE)
        if completion is not None:
            # shtab's own way to say how an argument is completed.
            action.complete = completion  # type: ignore[attr-defined]
    names = {
        "settings": " ".join(f"{setting.name}=" for setting in settings()),
        "run_files": " ".join(shipped_names()),
    }
    functions = {shell: text.format(**names) for shell, text in _FUNCTIONS.items()}
    sys.stdout.write(shtab.complete(parser, args.shell, preamble=functions[args.shell]) + "\n" + _ENDS[args.shell])
    return 0


def _completion(action: argparse.Action, paths: dict[str, Any]) -> dict[str, Any] | None:
    if action.metavar == "section.key=value":
        return _SETTINGS
    if action.dest in _RUN_FILES and not action.option_strings:
        return _RUN_FILE
    return paths if action.type is Path or action.dest in _PATHS else None


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
