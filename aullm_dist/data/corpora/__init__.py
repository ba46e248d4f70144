"""Readers of the licensed corpora, by the names used on the command line."""

import difflib
from pathlib import Path

from aullm_dist.data.corpora import casme2, fourdme, samm
from aullm_dist.data.corpora.base import BadRows, ClipRecord, CorpusIndex, CorpusSpec, Note, read_with
from aullm_dist.errors import UserError

__all__ = ["CORPORA", "ClipRecord", "CorpusIndex", "CorpusSpec", "Note", "get_corpus", "read_corpus"]

CORPORA: dict[str, CorpusSpec] = {spec.name: spec for spec in (casme2.SPEC, samm.SPEC, fourdme.SPEC)}


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


def read_corpus(name: str, root: str | Path, *, bad_rows: BadRows = "stop") -> CorpusIndex:
    """Read the annotations of a corpus and find its clips; see `base.read_with`.

    Raises:
        UserError: The name is not known, or the release cannot be read.
    """
    return read_with(get_corpus(name), root, bad_rows=bad_rows)
