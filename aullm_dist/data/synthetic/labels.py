"""Draws AU labels, sides, strengths and timing of the clips of a synthetic corpus.

A generator for tests and demos: no claim about real faces is made from it. The combination tables of the corpora are
this generator's own, chosen so that AU counts come out near the published counts of each corpus; they are not the
relation table of `aullm_dist.facs`, and hold pairs that contradict it (12+15, 4+14, 1+4). Labels are drawn without
regard to the subject: a deck of combinations is filled to the proportions, shuffled, and dealt.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from aullm_dist.data.corpora import get_drawable
from aullm_dist.data.corpora.drawn import AuCombination, ClipPlan, Movement, Side
from aullm_dist.data.synthetic.spec import SyntheticSpec

BILATERAL_AUS = frozenset({17, 24, 25, 43, 45})
"""AUs never coded for one side: they move the middle of the face, or close both eyes."""

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


def combination_weights(corpus: str, balance: float) -> dict[AuCombination, float]:
    """Return the probability of each AU combination, between the field's proportions (0) and equal AUs (1).

    The flat end (ours) rescales the combinations until the AUs of the corpus's set are about equally frequent.
    """
    spec = get_drawable(corpus)
    assert spec.synthetic is not None
    combinations = list(spec.synthetic.combinations)
    field = np.array([spec.synthetic.combinations[c] for c in combinations])
    field = field / field.sum()
    members = np.array([[au in c for au in spec.aus] for c in combinations], dtype=float)
    flat = field.copy()
    for _ in range(400):
        frequency = flat @ members
        flat *= np.exp(0.2 * members @ np.log(frequency.mean() / frequency))
        flat /= flat.sum()
    mixed = (1.0 - balance) * field + balance * flat
    return {c: float(w) for c, w in zip(combinations, mixed, strict=True)}


def plan_clips(spec: SyntheticSpec) -> list[ClipPlan]:
    """Draw every clip of the corpus, in workbook order (by subject, then by clip)."""
    facts = spec.facts
    rng = np.random.default_rng([*spec.seed_words, 1])
    dealt = _deal(spec, rng)
    count = len(dealt)
    apex_missing = set(rng.permutation(count)[: max(1, round(count * _APEX_MISSING_FRACTION))].tolist())
    one_sided = _choose(rng, [i for i, c in enumerate(dealt) if set(c) - BILATERAL_AUS], count, _UNILATERAL_FRACTION)
    static = _choose(rng, list(range(count)), count, _STATIC_FRACTION) if facts.static_aus else set()
    clips = []
    previous = 0
    for index, combination in enumerate(dealt):
        subject, ordinal = divmod(index, spec.clips_per_subject)
        movements = _draw_movements(combination, index in one_sided, rng)
        if index in static:
            movements += (_draw_static(spec, combination, rng),)
        length = int(rng.integers(spec.clip_lengths[0], spec.clip_lengths[1] + 1))
        if facts.first_numbers is None:
            onset = 1 + spec.context_frames
        else:
            if not facts.one_count or ordinal == 0:
                previous = int(rng.integers(*facts.first_numbers))
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
    aus = spec.corpus_spec.aus
    deck = _fill_deck(combination_weights(spec.corpus, spec.balance), spec.subjects * spec.clips_per_subject, aus)
    order = np.arange(len(deck))
    for _ in range(200):
        rng.shuffle(order)
        holders: dict[int, set[int]] = {au: set() for au in aus}
        for place, card in enumerate(order):
            for au in deck[card]:
                holders.get(au, set()).add(place // spec.clips_per_subject)
        if all(len(subjects) >= min(2, spec.subjects) for subjects in holders.values()):
            break
    return [deck[card] for card in order]


def _fill_deck(weights: dict[AuCombination, float], size: int, aus: Sequence[int]) -> list[AuCombination]:
    """Two cards for each AU of the set, as far as there is room, then whatever is furthest below its share."""
    counts: Counter[AuCombination] = Counter()
    for au in sorted(aus, key=lambda au: sum(w for c, w in weights.items() if au in c)):
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
    choices = [au for au in spec.corpus_spec.aus if au not in combination and au != 45]
    return Movement(au=int(rng.choice(choices)), side="both", strength=1.0, lag=0.0, static=True)


def _draw_emotion(combination: AuCombination, rng: np.random.Generator) -> str:
    for needed, emotions in _EMOTIONS:
        if needed <= set(combination):
            return emotions[rng.integers(len(emotions))]
    return "others"
