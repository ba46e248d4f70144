"""Counts memory and reading while the LLM is loaded: by one process whole, by several in pieces (`llm.pieces`)."""

from collections.abc import Sequence
from dataclasses import replace

from aullm_dist.llm.backbone import IDS_AT_ONCE
from aullm_dist.llm.pieces.loading import WEIGHTS_AT_ONCE
from aullm_dist.llm.quantization import BLOCK
from aullm_dist.planning.engines import FLOAT32, Engine, Term
from aullm_dist.planning.skeleton import Weight

BFLOAT16 = 2
_QUANTISER_BYTES = 16
"""On a CPU bitsandbytes makes 4 bytes each of a weight, its scaled form, its index, and what it is clamped from."""


def load_terms(engine: Engine, weights: Sequence[Weight], width: int) -> list[Term]:
    """Return the peak of loading, in a process that reads a checkpoint that is not quantised.

    Args:
        engine: the strategy.
        weights: all parameters.
        width: LLM width D.
    """
    if _loads_on_host(engine, weights):
        # Only then is it put on the GPU, parameter after parameter.
        return [replace(term, on_host=True) for term in load_terms(replace(engine, cpu=True), weights, width)]
    frozen = [w for w in weights if not w.trainable]
    trained = sum(w.nbytes for w in weights if w.trainable)
    best: list[Term] = []
    held = constants = 0
    for weight in frozen:
        constants += weight.constants
        there = [
            Term("frozen LLM so far" if engine.stage < 3 else "shares of the LLM so far", held, engine.offload_param),
            Term("quantisation constants so far", constants),
        ]
        best = _larger(best, [*there, *_one_weight(engine, weight)], engine.cpu)
        held += engine.share(weight)
    # Where it has another name, the embedding is what the forward pass begins with.
    first = next((w for w in frozen if w.name.endswith("embed_tokens.weight")), frozen[0])
    lora = sum(w.nbytes for w in weights if "lora_" in w.name)
    there = [*engine.base(weights), Term("LoRA", lora)]
    # The scale of the soft tokens is the embeddings': so many rows are looked up at a time.
    rows = min(IDS_AT_ONCE, first.numel // width)
    # A GPU takes their norms in float32 without turning them first.
    turned = FLOAT32 if engine.cpu and first.itemsize < FLOAT32 else 0
    looked_up = Term("embeddings looked up", rows * width * (first.itemsize + turned))
    if engine.stage < 3:
        return _larger(best, [*there, looked_up], engine.cpu)
    gathered = Term("embeddings, gathered", first.nbytes)
    received = first.nbytes if engine.cpu and engine.processes > 1 else 0
    arriving = Term("embeddings as they arrive", received)
    best = _larger(best, [*there, gathered, max(looked_up, arriving, key=lambda term: term.nbytes)], engine.cpu)
    # The other modules are built while the embeddings are there, in the machine's memory.
    built = Term("the other trained parameters", trained - lora, True)
    return _larger(best, [*there, built, gathered], engine.cpu)


def _loads_on_host(engine: Engine, weights: Sequence[Weight]) -> bool:
    """Return whether the library reads the LLM into the machine's memory: for one process, where nothing is packed."""
    return engine.processes == 1 and engine.stage < 3 and not engine.cpu and not any(w.constants for w in weights)


def _larger(best: list[Term], other: list[Term], cpu: bool) -> list[Term]:
    """Return the terms that come to more where the process computes."""
    return max(best, other, key=lambda terms: sum(t.nbytes for t in terms if cpu or not t.on_host))


def _one_weight(engine: Engine, weight: Weight) -> list[Term]:
    """Return what one weight takes while it is read, packed and placed."""
    count = engine.processes
    piece = -(-weight.nbytes // count)
    # On a CPU the other pieces are address space until they are received.
    made = piece if engine.cpu else weight.nbytes
    terms = []
    if engine.stage == 3 and engine.second == 1:
        placed = [Term("the weight at hand, and its share", made + piece)]
    else:
        received = weight.nbytes if engine.cpu and count > 1 else 0
        placed = [
            Term("the weight at hand, and pieces as they are sent", weight.nbytes + piece * (count > 1) + received)
        ]
    if not weight.constants:
        return placed
    at_once = min(WEIGHTS_AT_ONCE, -(-weight.weights // count))
    packing = at_once * (BFLOAT16 + (_QUANTISER_BYTES if engine.cpu else 0))
    constants = 2 * 4 * -(-weight.weights // BLOCK)
    terms = [
        Term("the weight at hand, packed so far", made + piece),
        Term("weights as they are packed", packing),
        Term("constants in float32", constants),
    ]
    return max(terms, placed, key=lambda some: sum(t.nbytes for t in some))


def read_bytes(weights: Sequence[Weight]) -> int:
    """Return bytes of the LLM's files that all processes together read; the vocabulary head is not read."""
    return sum(BFLOAT16 * w.weights for w in weights if not w.trainable)
