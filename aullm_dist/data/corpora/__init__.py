"""Reads the licensed corpora, by the names used on the command line.

Each corpus is one module with a `SPEC`, and the modules are listed here; other packages add theirs (`registry`).
"""

from pathlib import Path

from aullm_dist.data.corpora import casme, casme2, casme3a, casme3c, fourdme, mmew, samm
from aullm_dist.data.corpora.base import read_with
from aullm_dist.data.corpora.drawn import SyntheticFacts
from aullm_dist.data.corpora.registry import CORPORA, corpus_names, find_corpus, get_corpus, get_drawable, register
from aullm_dist.data.corpora.spec import BadRows, ClipRecord, Columns, CorpusIndex, CorpusSpec, Note, Provenance
from aullm_dist.errors import file_errors

__all__ = [
    "CORPORA",
    "ClipRecord",
    "Columns",
    "CorpusIndex",
    "CorpusSpec",
    "Note",
    "Provenance",
    "SyntheticFacts",
    "corpus_names",
    "find_corpus",
    "get_corpus",
    "get_drawable",
    "read_corpus",
    "register",
]

for _module in (casme, casme2, samm, fourdme, mmew, casme3a, casme3c):
    register(_module.SPEC)


def read_corpus(
    name: str, root: str | Path, *, bad_rows: BadRows = "stop", errata: str | Path | None = None
) -> CorpusIndex:
    """Read the annotations of a corpus and find its clips; see `base.read_with`.

    Raises:
        UserError: The name is not known, or the release cannot be read.
    """
    with file_errors(str(root)):
        return read_with(get_corpus(name), root, bad_rows=bad_rows, errata=errata)
