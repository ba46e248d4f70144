"""Counts memory while a checkpoint is collected and written, in the process that writes it (`checkpoint.store`)."""

from collections.abc import Sequence

from aullm_dist.planning.engines import Engine, Term
from aullm_dist.planning.skeleton import Weight


def save_terms(engine: Engine, weights: Sequence[Weight]) -> list[Term]:
    """Return what saving takes beyond what stays: the values whole, one parameter gathered at a time."""
    trained = [w for w in weights if w.trainable]
    total, largest = sum(w.nbytes for w in trained), max(w.nbytes for w in trained)
    copies = saved_copies(engine)
    terms = [Term(f"what is written: {copies}T", copies * total, True)] if copies else []
    if not engine.is_plain:
        terms.append(Term("one parameter, gathered", largest))
    return terms


def saved_copies(engine: Engine) -> int:
    """Return how many times T the writer copies: weights, float32 masters and two moments, unless it has them."""
    if not engine.cpu:
        return 4
    # Whole tensors that lie in the machine's memory already are written from there; moments are copied in any case.
    return {0: 2, 1: 3, 2: 3, 3: 4}[0 if engine.is_plain else engine.stage]


def checkpoint_bytes(weights: Sequence[Weight]) -> int:
    """Return bytes of a checkpoint's tensors: of each trained value its float32 weight, master and two moments."""
    return 4 * sum(w.nbytes for w in weights if w.trainable)
