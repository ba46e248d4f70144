"""AU labels, sides, strengths and timing of the clips of a synthetic corpus.

A generator for tests and demos: no claim about real faces is made from it. The combination tables below are this
generator's own, chosen so that AU counts come out near the published counts of each corpus; they are not the relation
table of `aullm_dist.facs`, and hold pairs that contradict it (12+15, 4+14, 1+4). Labels are drawn without regard to
the subject: a deck of combinations is filled to the proportions, shuffled, and dealt.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aullm_dist.data.synthetic.spec import SyntheticSpec
from aullm_dist.facs import AU_SETS

Side = Literal["both", "left", "right"]
AuCombination = tuple[int, ...]

# Combination -> weight. Source of the AU counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
COMBINATIONS: dict[str, dict[AuCombination, float]] = {
    "casme2": {
        (4,): 60, (4, 7): 33, (4, 9): 8, (4, 10): 6, (4, 15): 4, (4, 17): 4, (4, 14): 3, (4, 12): 4, (1, 4): 4,
        (1, 2): 14, (1,): 6, (2,): 5, (2, 15): 1, (1, 2, 5): 2, (7,): 3, (6, 7, 12): 3, (12,): 11, (6, 12): 8,
        (12, 15): 4, (12, 14): 4, (14,): 13, (14, 15): 2, (14, 17): 5, (15,): 2, (15, 17): 3, (17,): 10, (10,): 6,
        (10, 17): 3, (9,): 5, (6,): 2, (24,): 6, (25,): 4, (20,): 4,
    },
    "samm": {
        (7,): 30, (4, 7): 8, (4,): 12, (4, 9): 2, (12,): 16, (6, 12): 3, (7, 12): 4, (12, 14): 3, (12, 25): 2,
        (1, 2): 5, (2,): 7, (2, 5): 4, (2, 20): 2, (1,): 1, (5,): 6, (14,): 9, (15,): 3, (15, 17): 1, (17,): 5,
        (10,): 5, (9,): 3, (20,): 6, (24,): 8, (25,): 6, (7, 43): 4, (43,): 4,
    },
    "4dme": {
        (4,): 30, (4, 7): 48, (7,): 20, (1, 2): 26, (2,): 12, (1,): 7, (1, 2, 4): 5, (2, 7): 3, (1, 2, 5): 5,
        (4, 12): 3, (12,): 18, (6, 12): 14, (6, 7, 12): 6, (7, 12): 6, (12, 45): 4, (45,): 12, (4, 45): 8,
        (1, 2, 45): 3, (2, 45): 2, (7, 45): 6, (17,): 5, (4, 17): 3, (15, 17): 3, (6,): 5, (14,): 4, (10,): 2,
        (15,): 3, (4, 5): 3,
    },
    "casme": {
        (4,): 50, (4, 9): 14, (9,): 25, (1, 2): 12, (1,): 8, (2,): 5, (1, 4): 3, (4, 7): 3, (7,): 1, (12,): 8,
        (6, 12): 1, (14,): 21, (14, 17): 2, (15,): 11, (15, 17): 3, (17,): 8, (10,): 3, (24,): 6, (20,): 5,
    },
    "mmew": {
        (1, 2): 20, (1, 2, 5): 18, (1,): 10, (2, 5): 3, (5,): 39, (4,): 45, (4, 7): 37, (4, 5): 10, (4, 10): 6,
        (4, 9): 5, (4, 17): 3, (1, 4): 2, (7,): 7, (7, 10): 3, (12,): 24, (6, 12): 8, (10, 12): 3, (10,): 26,
        (14,): 15, (12, 14): 2, (15,): 5, (15, 17): 1, (17,): 7, (9,): 3, (6,): 2, (24,): 6,
    },
    "casme3a": {
        (1, 2): 105, (1,): 38, (2,): 14, (1, 2, 5): 9, (5,): 35, (4,): 226, (4, 7): 15, (4, 9): 24, (9,): 26,
        (7,): 12, (4, 14): 9, (14,): 181, (14, 17): 3, (12,): 10, (6, 12): 5, (6,): 3, (10,): 10, (15,): 4,
        (15, 17): 2, (17,): 15, (20,): 30, (24,): 50, (25,): 34,
    },
}  # fmt: skip
# No counts of part C are published: those of part A stand in **(ours)**.
COMBINATIONS["casme3c"] = COMBINATIONS["casme3a"]

BILATERAL_AUS = frozenset({17, 24, 25, 43, 45})
"""AUs never coded for one side: they move the middle of the face, or close both eyes."""

# Most corpora number the frames of each video; SAMM goes on through a subject's session, and CAS(ME)^3 through a video
# that holds several clips. CASME II numbers cross 999, where sorting by name goes wrong, and lie above every frame
# number of its published errata, which must find nothing to mend here. MMEW counts each clip from 1.
_FIRST_NUMBERS = {
    "casme2": (900, 960), "samm": (900, 6000), "4dme": (20, 120), "casme": (20, 900), "casme3a": (1, 900),
    "casme3c": (1, 900),
}  # fmt: skip
_ONE_COUNT = ("samm", "casme3a")

_STRENGTHS = (0.75, 1.25)
_UNILATERAL_FRACTION = 0.12
_APEX_MISSING_FRACTION = 21 / 256  # CASME II: 21 of the 256 rows hold '/' in place of the apex.
_STATIC_FRACTION = 0.08

# Words of our own; `layouts` spells them as each workbook does. Emotion is deliberately no function of the AUs.
_EMOTIONS: tuple[tuple[frozenset[int], tuple[str, ...]], ...] = (
    (frozenset({1, 2}), ("surprise", "surprise", "others")),
    (frozenset({12}), ("happiness", "happiness", "others", "repression")),
    (frozenset({9}), ("disgust",)),
    (frozenset({10}), ("disgust", "others")),
    (frozenset({4}), ("disgust", "others", "others", "anger")),
    (frozenset({15}), ("sadness", "repression")),
    (frozenset({14}), ("others", "repression", "contempt")),
    (frozenset({17}), ("repression", "others")),
    (frozenset({1}), ("sadness", "fear", "surprise")),
)


@dataclass(frozen=True, slots=True)
class Movement:
    """One AU in one clip; `lag` shifts its peak from the apex, as a fraction of the clip; `static` AUs do not move."""

    au: int
    side: Side
    strength: float
    lag: float
    static: bool = False


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Everything about a clip but its pixels. Frame numbers are file frame numbers, both ends inclusive."""

    index: int
    subject: int
    ordinal: int
    movements: tuple[Movement, ...]
    onset: int
    apex: int
    offset: int
    residual: float
    emotion: str
    apex_missing: bool

    @property
    def active_aus(self) -> tuple[int, ...]:
        """Sorted AUs that move during the clip: the clip's label."""
        return tuple(sorted(m.au for m in self.movements if not m.static))

    @property
    def num_frames(self) -> int:
        """Frames from onset to offset."""
        return self.offset - self.onset + 1


def combination_weights(corpus: str, balance: float) -> dict[AuCombination, float]:
    """Return the probability of each AU combination, between the field's proportions (0) and equal AUs (1).

    The flat end (ours) rescales the combinations until the AUs of the corpus's set are about equally frequent.
    """
    combinations = list(COMBINATIONS[corpus])
    field = np.array([COMBINATIONS[corpus][c] for c in combinations])
    field = field / field.sum()
    members = np.array([[au in c for au in AU_SETS[corpus]] for c in combinations], dtype=float)
    flat = field.copy()
    for _ in range(400):
        frequency = flat @ members
        flat *= np.exp(0.2 * members @ np.log(frequency.mean() / frequency))
        flat /= flat.sum()
    mixed = (1.0 - balance) * field + balance * flat
    return {c: float(w) for c, w in zip(combinations, mixed, strict=True)}


def plan_clips(spec: SyntheticSpec) -> list[ClipPlan]:
    """Draw every clip of the corpus, in workbook order (by subject, then by clip)."""
    rng = np.random.default_rng([*spec.seed_words, 1])
    dealt = _deal(spec, rng)
    count = len(dealt)
    apex_missing = set(rng.permutation(count)[: max(1, round(count * _APEX_MISSING_FRACTION))].tolist())
    one_sided = _choose(rng, [i for i, c in enumerate(dealt) if set(c) - BILATERAL_AUS], count, _UNILATERAL_FRACTION)
    static = _choose(rng, list(range(count)), count, _STATIC_FRACTION) if spec.corpus == "4dme" else set()
    clips = []
    previous = 0
    for index, combination in enumerate(dealt):
        subject, ordinal = divmod(index, spec.clips_per_subject)
        movements = _draw_movements(combination, index in one_sided, rng)
        if index in static:
            movements += (_draw_static(spec, combination, rng),)
        length = int(rng.integers(spec.clip_lengths[0], spec.clip_lengths[1] + 1))
        if spec.corpus == "mmew":
            onset = 1 + spec.context_frames
        else:
            if spec.corpus not in _ONE_COUNT or ordinal == 0:
                previous = int(rng.integers(*_FIRST_NUMBERS[spec.corpus]))
            onset = previous + int(rng.integers(20, 80)) + spec.context_frames
        previous = onset + length - 1 + spec.context_frames
        clips.append(
            ClipPlan(
                index=index,
                subject=subject,
                ordinal=ordinal,
                movements=movements,
                onset=onset,
                apex=onset + int(np.clip(round((length - 1) * rng.uniform(0.35, 0.65)), 1, length - 2)),
                offset=onset + length - 1,
                residual=float(rng.uniform(0.0, 0.4)),
                emotion=_draw_emotion(combination, rng),
                apex_missing=index in apex_missing,
            )
        )
    return clips


def _deal(spec: SyntheticSpec, rng: np.random.Generator) -> list[AuCombination]:
    """Fill a deck to the proportions, shuffle it, deal it to the subjects.

    Where an AU of the corpus's set fell to fewer than two subjects the deck is shuffled again: a condition that treats
    all subjects alike, so that labels stay independent of identity.
    """
    deck = _fill_deck(
        combination_weights(spec.corpus, spec.balance), spec.subjects * spec.clips_per_subject, spec.corpus
    )
    order = np.arange(len(deck))
    for _ in range(200):
        rng.shuffle(order)
        holders = {au: set() for au in AU_SETS[spec.corpus]}
        for place, card in enumerate(order):
            for au in deck[card]:
                holders.get(au, set()).add(place // spec.clips_per_subject)
        if all(len(subjects) >= min(2, spec.subjects) for subjects in holders.values()):
            break
    return [deck[card] for card in order]


def _fill_deck(weights: dict[AuCombination, float], size: int, corpus: str) -> list[AuCombination]:
    """Two cards for each AU of the set, as far as there is room, then whatever is furthest below its share."""
    counts: Counter[AuCombination] = Counter()
    for au in sorted(AU_SETS[corpus], key=lambda au: sum(w for c, w in weights.items() if au in c)):
        best = max((c for c in weights if au in c), key=weights.__getitem__)
        while sum(n for c, n in counts.items() if au in c) < 2 and counts.total() < size:
            counts[best] += 1
    while counts.total() < size:
        counts[max(weights, key=lambda c: weights[c] * size - counts[c])] += 1
    return [c for c in weights for _ in range(counts[c])]


def _choose(rng: np.random.Generator, candidates: list[int], count: int, fraction: float) -> set[int]:
    """Choose about `fraction` of all `count` clips, and at least one, so that every corpus shows the quirk."""
    return set(rng.permutation(candidates)[: max(1, round(count * fraction))].tolist())


def _draw_movements(combination: AuCombination, one_sided: bool, rng: np.random.Generator) -> tuple[Movement, ...]:
    can_be_sided = [au for au in combination if au not in BILATERAL_AUS]
    sided = (
        set(rng.permutation(can_be_sided)[: rng.integers(1, len(can_be_sided) + 1)].tolist()) if one_sided else set()
    )
    sides: tuple[Side, Side] = ("left", "right")
    return tuple(
        Movement(
            au=au,
            side=sides[rng.integers(2)] if au in sided else "both",
            strength=float(rng.uniform(*_STRENGTHS)),
            lag=float(rng.uniform(-0.05, 0.05)),
        )
        for au in combination
    )


def _draw_static(spec: SyntheticSpec, combination: AuCombination, rng: np.random.Generator) -> Movement:
    """An AU that is held all through the clip: 4DME writes it with `(k)` and it is no label. A blink cannot be held."""
    choices = [au for au in AU_SETS[spec.corpus] if au not in combination and au != 45]
    return Movement(au=int(rng.choice(choices)), side="both", strength=1.0, lag=0.0, static=True)


def _draw_emotion(combination: AuCombination, rng: np.random.Generator) -> str:
    for needed, emotions in _EMOTIONS:
        if needed <= set(combination):
            return emotions[rng.integers(len(emotions))]
    return "others"
