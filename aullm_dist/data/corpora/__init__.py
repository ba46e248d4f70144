"""Readers of the licensed corpora, by the names used on the command line."""

import difflib
from pathlib import Path

from aullm_dist.data.corpora import casme, casme2, casme3a, casme3c, fourdme, mmew, samm
from aullm_dist.data.corpora.base import read_with
from aullm_dist.data.corpora.spec import BadRows, ClipRecord, CorpusIndex, CorpusSpec, Note
from aullm_dist.errors import UserError

__all__ = ["CORPORA", "ClipRecord", "CorpusIndex", "CorpusSpec", "Note", "get_corpus", "read_corpus"]

_MODULES = (casme, casme2, samm, fourdme, mmew, casme3a, casme3c)
CORPORA: dict[str, CorpusSpec] = {module.SPEC.name: module.SPEC for module in _MODULES}


def get_corpus(name: str) -> CorpusSpec:
    """Return the corpus called `name`.

    Raises:
        UserError: There is none; the nearest name is given.
    """
    if name in CORPORA:
        return CORPORA[name]
    near = difflib.get_close_matches(name, CORPORA, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"corpus {name!r} is not known{hint}; allowed: {', '.join(CORPORA)}")


def read_corpus(
    name: str, root: str | Path, *, bad_rows: BadRows = "stop", errata: str | Path | None = None
) -> CorpusIndex:
    """Read the annotations of a corpus and find its clips; see `base.read_with`.

    Raises:
        UserError: The name is not known, or the release cannot be read.
    """
    return read_with(get_corpus(name), root, bad_rows=bad_rows, errata=errata)
