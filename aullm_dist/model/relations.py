"""Defines the typed, sparse prior over an AU vocabulary, and small interventions on it.

The prior is read from `aullm_dist.facs` alone, never from labels. `training_statistics` is the one function here that
sees labels; it is for the training fold's and is off by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from aullm_kernels import EdgeTable

from aullm_dist.errors import UserError
from aullm_dist.facs import AU_REGIONS, PROTOTYPES, RELATION_ROWS, RELATIONS, Relation

MAX_IN_DEGREE = 16
"""Incoming edges per node up to which candidates are added; a bounded degree keeps the attention's rows short."""


@dataclass(frozen=True, eq=False)
class AURelations:
    """Directed, typed edges over the AUs of a vocabulary, `self` edges included.

    Attributes:
        aus: AU number of each node, `[A]`.
        target: Node that an edge ends in, `[E]` int64.
        source: Node that an edge comes from, `[E]` int64.
        relation: Index of an edge's type in `names`, `[E]` int64.
        prior_mask: `[E]` bool, true for the prior's edges, false for the candidates that only rewiring uses.
        names: Names of the relation types.
    """

    aus: tuple[int, ...]
    target: np.ndarray
    source: np.ndarray
    relation: np.ndarray
    prior_mask: np.ndarray
    names: tuple[Relation, ...] = RELATIONS

    @property
    def num_edges(self) -> int:
        """Number of edges E, candidates included."""
        return len(self.target)

    @property
    def signs(self) -> np.ndarray:
        """`[E]` float32: -1 for antagonists, else 1."""
        return np.where(self.relation == self.names.index("antagonist"), -1.0, 1.0).astype(np.float32)

    def describe(self) -> list[list[int | str | bool]]:
        """Return each edge as (target AU, source AU, type, in the prior), for checkpoints to compare."""
        columns = zip(self.target, self.source, self.relation, self.prior_mask, strict=True)
        return [[self.aus[i], self.aus[j], self.names[kind], bool(prior)] for i, j, kind, prior in columns]

    def edge_table(self) -> EdgeTable:
        """Return the edges as `graph_attention` takes them, on the CPU."""
        target, source, relation = (
            torch.from_numpy(column.copy()) for column in (self.target, self.source, self.relation)
        )
        return EdgeTable(target, source, relation, num_nodes=len(self.aus))


def relation_between(first: int, second: int) -> Relation | None:
    """Return the strongest relation of two different AUs, or None.

    One pair gets one type, the most specific statement about it: a signed row of `facs.RELATION_ROWS` (`co-occur` or
    `antagonist`: someone wrote down this very pair), else `subset` (both belong to one emotion prototype, of which a
    micro-expression shows a subset), else `region` (same part of the face). A weaker statement would only repeat, or
    contradict, the stronger one: AU1 and AU7 share the prototype of fear, yet are cited as excluding each other.
    """
    for row in RELATION_ROWS:
        if {row.first, row.second} == {first, second}:
            return row.relation
    if any(first in prototype and second in prototype for prototype in PROTOTYPES.values()):
        return "subset"
    if first in AU_REGIONS and AU_REGIONS[first] == AU_REGIONS.get(second):
        return "region"
    return None


def build_relations(aus: Sequence[int]) -> AURelations:
    """Build the prior for the AUs under test.

    Every relation gives two directed edges and every AU a `self` edge. Pairs without a relation become candidates:
    masked off in the factual structure, typed `co-occur`, so that rewiring states a co-occurrence that the prior does
    not know, through weights that real edges have trained. A node gets no more of them than `MAX_IN_DEGREE` leaves
    room for.

    Args:
        aus: AU numbers, in the order of the nodes.

    Raises:
        UserError: The list is empty or holds a number twice.
    """
    aus = tuple(int(au) for au in aus)
    if not aus or len(set(aus)) != len(aus):
        raise UserError(f"AUs under test: {list(aus)}, allowed is a list of one or more different AU numbers")
    rows = [(node, node, "self", True) for node in range(len(aus))]
    unrelated = []
    for i, j in combinations(range(len(aus)), 2):
        relation = relation_between(aus[i], aus[j])
        if relation is None:
            unrelated += [(i, j), (j, i)]
        else:
            rows += [(i, j, relation, True), (j, i, relation, True)]
    degree = np.bincount([row[0] for row in rows], minlength=len(aus))
    for target, source in unrelated:
        if degree[target] < MAX_IN_DEGREE:
            degree[target] += 1
            rows.append((target, source, "co-occur", False))
    rows.sort(key=lambda row: row[:2])
    return AURelations(
        aus=aus,
        target=np.array([row[0] for row in rows], dtype=np.int64),
        source=np.array([row[1] for row in rows], dtype=np.int64),
        relation=np.array([RELATIONS.index(row[2]) for row in rows], dtype=np.int64),
        prior_mask=np.array([row[3] for row in rows], dtype=bool),
    )


def training_statistics(relations: AURelations, labels: np.ndarray) -> np.ndarray:
    """Return a first strength for each edge from the labels of a training fold (ours).

    It is the correlation of both AUs' labels, with the sign that the edge's type expects: an antagonist pair that is
    seldom active together gets a positive strength. `self` edges and AUs that are always or never active get 0.

    Args:
        relations: The prior.
        labels: 0/1 labels `[n, A]` of the TRAINING fold only; labels of held-out subjects here would leak into the
            model.

    Returns:
        `[E]` float32 in -1..1.
    """
    labels = np.asarray(labels, dtype=np.float64)
    assert labels.ndim == 2, labels.shape
    assert labels.shape[1] == len(relations.aus), labels.shape
    centred = labels - labels.mean(axis=0) if len(labels) else labels
    norm = np.linalg.norm(centred, axis=0)
    scale = np.outer(norm, norm)
    correlation = np.divide(centred.T @ centred, scale, out=np.zeros_like(scale), where=scale > 1e-12)
    strength = correlation[relations.target, relations.source] * relations.signs
    strength[relations.target == relations.source] = 0.0
    return strength.astype(np.float32)


def sample_structure_edit(relations: AURelations, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the edge mask of a structure intervention: a few of the prior's edges are cut or rewired.

    Between one edge and `fraction` of the prior's edges (`self` edges neither count nor change) are touched. Each is
    cut or, with an even chance where its target has a free candidate, rewired: replaced by a candidate edge into the
    same node. A node keeps its `self` edge always, and one of its relations as long as some edit elsewhere is
    possible.

    Args:
        relations: The prior.
        fraction: Largest share of the prior's edges to touch, in 0..1; one edge may always be touched.
        rng: Source of the draw.

    Returns:
        `[E]` bool. The prior itself for a vocabulary without any relation, where there is nothing to touch.

    Raises:
        UserError: `fraction` is outside 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UserError(f"share of edited edges is {fraction}, allowed are numbers from 0 to 1")
    mask = relations.prior_mask.copy()
    related = relations.target != relations.source
    editable = np.flatnonzero(mask & related)
    if len(editable) == 0:
        return mask
    wanted = int(rng.integers(1, max(1, int(fraction * len(editable))) + 1))
    remaining = np.bincount(relations.target[editable], minlength=len(relations.aus))
    order = rng.permutation(editable)
    touched = 0
    for edge in order:
        if touched == wanted:
            break
        node = relations.target[edge]
        candidates = np.flatnonzero((relations.target == node) & ~relations.prior_mask & ~mask)
        rewire = len(candidates) > 0 and (remaining[node] == 1 or rng.random() < 0.5)
        if not rewire and remaining[node] == 1:
            continue
        mask[edge] = False
        if rewire:
            mask[rng.choice(candidates)] = True
        else:
            remaining[node] -= 1
        touched += 1
    if touched == 0:
        mask[order[0]] = False
    return mask
