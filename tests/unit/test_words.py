"""Holds the words of CONTRIBUTING, verbs at the start of module docstrings, and one form of help texts."""

import argparse
import ast
import functools
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from aullm_dist.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]

# Words of another meaning than the reader's, and what stands for them. "divided by" is arithmetic, and so is a number
# that "divides" another.
WORDS = {
    r"anew": "again, or re-",
    r"divided(?! by\b)": "partitioned, sharded, split",
    r"told|spoken of|said of": "logged, reported, given, distinguished",
    r"troubles?": "warning",
    r"mend(?:s|ed|ing)?": "fix",
    r"in silence|without a word": "silently",
    r"(?:go|goes|going|went|gone) on(?! the\b)": "resumes, continues",
    r"(?:go|goes|going) round again": "requeue",
    r"a life": "an attempt, a process",
    r"hears? of|heard of": "record, inspect",
    r"given up|gives up": "stopped, disabled",
    r"(?:give|gives|given|gave) back": "release, free",
    r"lets? go of": "release, free",
    r"beside": "next to, in addition to, with",
    r"without values": "on the meta device, shape-only",
    r"suffixes that nobody reads": "padding suffixes",
}
# Names of parameters and fields, where a word stays: by file, with the words around it.
ALLOWED = {
    "aullm_dist/distributed/engine.py": ("divided: whether its frozen LLM is in pieces",),
    "aullm_dist/planning/recorder.py": ("anew: whether that forward pass happens",),
    "aullm_dist/planning/trace.py": ("divided: linear layers as DeepSpeed's ZeRO-3",),
}


@functools.cache
def _pattern() -> re.Pattern[str]:
    return re.compile("|".join(rf"(?P<w{number}>\b(?:{word})\b)" for number, word in enumerate(WORDS)), re.IGNORECASE)


def _hits(path: str, text: str) -> Iterator[str]:
    """Yield a line for each word that must not be in a text, which may break lines anywhere."""
    text = re.sub(r"\s+", " ", text)
    for allowed in ALLOWED.get(path, ()):
        text = text.replace(allowed, "")
    for match in _pattern().finditer(text):
        instead = list(WORDS.values())[int(match.lastgroup[1:])]
        around = text[max(0, match.start() - 40) : match.end() + 40]
        yield f"{path}: ...{around}...: instead of {match[0]!r}: {instead}"


def _sources() -> Iterator[tuple[str, str]]:
    """Yield path and text of every module."""
    for package in ("aullm_dist", "kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _strings(module: ast.Module) -> Iterator[str]:
    """Yield all strings of a module, messages and docstrings alike, those of f-strings in one piece."""
    parts = set()
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def test_messages_and_docstrings_use_the_words_of_the_list():
    hits = []
    for path, source in _sources():
        # Parsing takes long, and most modules hold none of the words, not even in a comment. Quotes between two
        # lines of a message may stand between two words.
        if _pattern().search(re.sub(r"\s+", " ", re.sub(r'"\s+f?"', "", source))):
            hits += [hit for text in _strings(ast.parse(source)) for hit in _hits(path, text)]
    assert not hits, "\n".join(hits)


def _comments(source: str) -> Iterator[str]:
    """Yield the comments of a module, each block of lines in one piece."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and block:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(block)


def test_comments_use_the_words_of_the_list():
    hits = []
    for path, source in [*_sources(), *_benchmarks()]:
        if _pattern().search(re.sub(r"\s+#?\s*", " ", source)):
            hits += [hit for text in _comments(source) for hit in _hits(path, text)]
    assert not hits, "\n".join(hits)


def _benchmarks() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _documents() -> Iterator[Path]:
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/*.md",
        "examples/*.ipynb",
        "kernels/*.md",
        "aullm_dist/*/*.jinja",
    ):
        yield from sorted(ROOT.glob(pattern))
    yield from sorted(ROOT.glob("configs/experiments/**/*.yaml"))
    yield from sorted(ROOT.glob("launchers/*.sh"))


def test_documents_use_the_words_of_the_list():
    hits = []
    for path in _documents():
        name = path.relative_to(ROOT).as_posix()
        # Entries of the changelog stay as they were published.
        if name == "CHANGELOG.md":
            continue
        text = path.read_text(encoding="utf-8")
        if name == "CONTRIBUTING.md":
            text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
        hits += _hits(name, text)
    assert not hits, "\n".join(hits)


def test_the_list_finds_its_words_and_leaves_arithmetic_alone():
    assert len(list(_hits("x", "It goes\non beside a divided LLM, and nobody is told."))) == 4
    assert not list(_hits("x", "divided by all clips; goes on the card; besides; a number that divides them"))


def test_every_word_of_the_list_stands_in_contributing():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    found = {number for line in table for match in _pattern().finditer(line) if (number := match.lastgroup)}
    missing = [word for number, word in enumerate(WORDS) if f"w{number}" not in found]
    assert not missing, f"words that the table in CONTRIBUTING does not explain: {missing}"


def test_every_exception_is_still_needed():
    for path, exceptions in ALLOWED.items():
        text = re.sub(r"\s+", " ", (ROOT / path).read_text(encoding="utf-8"))
        for exception in exceptions:
            assert exception in text, f"{path}: {exception!r} is no longer there"
            assert _pattern().search(exception), f"{exception!r} holds no word of the list"


def test_module_docstrings_begin_with_a_verb():
    """In the third person, "Collects ...": what ends in no s, or is followed by "of" or a colon, is a thing."""
    things = [
        f"{path}: {first}: begin with what the module does, as in 'Collects model-card data from ...'"
        for path, source in _sources()
        if not re.match(r'"""[A-Z][a-z-]*[^s\W]s\b(?!:| of\b| whose\b)', first := source.partition("\n")[0])
    ]
    assert not things, "\n".join(things)


def _commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command that can be run, `backbone check` as well as `config`, with its parser."""

    def below(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            yield name, parser
        for group in groups:
            for word, child in group.choices.items():
                yield from below(f"{name} {word}".strip(), child)

    return below("", build_parser())


COMMANDS = dict(_commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_has_one_example_that_parses(name):
    examples = re.findall(r"^Example: (.*)$", COMMANDS[name].epilog or "", re.MULTILINE)
    assert len(examples) == 1, f"{name}: {examples}; end the help with one example, by options.show_example"
    words = shlex.split(examples[0].partition(" > ")[0])
    words = words[words.index("aullm-dist") + 1 :]
    assert " ".join(words).startswith(name)
    build_parser().parse_args(words)  # leaves with an error where the example is not allowed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_shows_defaults_in_one_way(name):
    for action in COMMANDS[name]._actions:
        text = (action.help or "") % {**vars(action), "prog": "aullm-dist"}
        shown = re.search(r"\(default: (.+)\)$", text)
        option = f"{name} {'/'.join(action.option_strings) or action.dest}: {text!r}"
        if shown is None:
            assert not re.search(r"\(\S*\)$", text), f"{option}: write (default: X)"
            takes_a_value = action.option_strings and action.nargs != 0 and not action.required
            assert not (takes_a_value and action.default not in (None, "", [])), f"{option}: ends with no (default: X)"
        elif isinstance(action.default, str) and action.choices:
            assert shown[1].split(",")[0] == action.default, f"{option}: the default is {action.default}"
        elif isinstance(action.default, int | float) and action.nargs != 0:
            assert float(shown[1]) == action.default, f"{option}: the default is {action.default}"
