"""Finds corpora by name: those registered in this process, and those that other packages add.

A package adds a corpus with an entry point of the group `aullm_dist.corpora`: the corpus's name, and the `CorpusSpec`
that it loads. It is then known to every command and process; `register` holds for the process that calls it.
"""

import difflib
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from aullm_dist.data.corpora.spec import CorpusSpec
from aullm_dist.errors import UserError

__all__ = ["CORPORA", "ENTRY_POINTS", "corpus_names", "find_corpus", "get_corpus", "get_drawable", "register"]

ENTRY_POINTS = "aullm_dist.corpora"
CORPORA: dict[str, CorpusSpec] = {}
"""Registered corpora by name; `register` adds to them."""


def register(spec: CorpusSpec) -> CorpusSpec:
    """Make a corpus known to this process by its name, and return it.

    Raises:
        UserError: The name is taken by another corpus, or name or AU set cannot be used.
    """
    if CORPORA.get(spec.name, spec) is not spec:
        raise UserError(f"corpus {spec.name!r} is registered already; allowed: a name that is not taken")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", spec.name):
        raise UserError(f"corpus {spec.name!r}: the name cannot be used; allowed: a-z, 0-9 and _, as in casme2")
    if not spec.aus or list(spec.aus) != sorted(set(spec.aus)) or spec.aus[0] < 1:
        raise UserError(f"corpus {spec.name}: aus is {spec.aus!r}; allowed: at least one AU number, ascending")
    if spec.synthetic is not None:
        drawn = {au for combination in spec.synthetic.combinations for au in combination}
        if missing := sorted(set(spec.aus) - drawn):
            raise UserError(
                f"corpus {spec.name}: no AU combination of its synthetic facts holds AU{missing[0]}; allowed: "
                f"combinations that hold each of {', '.join(map(str, spec.aus))}"
            )
    CORPORA[spec.name] = spec
    return spec


def corpus_names() -> tuple[str, ...]:
    """Return the names of all corpora, those of other packages last."""
    return (*CORPORA, *sorted(_points()))


def find_corpus(name: str) -> CorpusSpec | None:
    """Return the corpus called `name`, None where there is none.

    Raises:
        UserError: It is another package's, and cannot be loaded.
    """
    if name in CORPORA:
        return CORPORA[name]
    point = _points().get(name)
    return None if point is None else register(_load(point))


def get_corpus(name: str) -> CorpusSpec:
    """Return the corpus called `name`.

    Raises:
        UserError: There is none, and the nearest name is given; or it is another package's, and cannot be loaded.
    """
    spec = find_corpus(name)
    if spec is None:
        names = corpus_names()
        raise UserError(f"corpus {name!r} is not known{_hint(name, names)}; allowed: {', '.join(names)}")
    return spec


def get_drawable(name: str, where: str = "synthetic corpus: corpus") -> CorpusSpec:
    """Return the corpus called `name`, which a synthetic corpus can be drawn of.

    Args:
        name: Of the corpus.
        where: The setting that holds the name, for the message.

    Raises:
        UserError: There is no such corpus, or it has no synthetic facts.
    """
    spec = find_corpus(name)
    if spec is None or spec.synthetic is None:
        known = filter(None, map(find_corpus, corpus_names()))
        names = [corpus.name for corpus in known if corpus.synthetic is not None]
        raise UserError(f"{where} is {name!r}{_hint(name, names)}; allowed: {', '.join(names)}")
    return spec


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _points() -> dict[str, EntryPoint]:
    """Return the corpora of other packages that are not loaded yet; they cannot take the place of a registered one."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in CORPORA}


def _load(point: EntryPoint) -> CorpusSpec:
    try:
        spec = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"corpus {point.name}: {point.value} cannot be loaded ({error}); repair or remove its package"
        ) from error
    if not isinstance(spec, CorpusSpec) or spec.name != point.name:
        raise UserError(f"corpus {point.name}: {point.value} is no aullm_dist.data.corpora.CorpusSpec of this name")
    return spec
