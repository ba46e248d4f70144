"""Measures how far corpora lie apart in a feature space: a number, and the picture that it belongs to.

Shapes: n clips, F features.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aullm_dist.errors import UserError
from aullm_dist.evaluation.bootstrap import interval, subject_weights

FOLDS = 5
MOST_POINTS = 3000
"""Clips that t-SNE is given at most; its time grows faster than their number."""
_COMPONENTS, _PERPLEXITY, _FEWEST_CLIPS = 50, 30.0, 8


@dataclass(frozen=True, slots=True)
class Gap:
    """Balanced accuracy of telling the corpus of clips of unseen subjects, a fraction; 1/corpora is chance."""

    balanced_accuracy: float
    ci: tuple[float, float] | None
    chance: float
    clips: int
    subjects: int


def domain_gap(
    features: np.ndarray, corpora: Sequence[str], subjects: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Gap:
    """Measure how well a linear classifier tells the corpus of a clip from frozen features.

    Logistic regression on standardised features, weighted to even classes; each clip is answered by a model that saw
    no clip of its subject (5 groups of subjects, fewer where a corpus has fewer). The interval resamples the subjects
    within each corpus and holds the answers fixed.

    Args:
        features: `[n, F]`.
        corpora: corpus of each clip, two or more different ones.
        subjects: subject of each clip; a subject belongs to one corpus.
        resamples: of the interval; 0 leaves it out.
        seed: of grouping and resampling.

    Raises:
        UserError: one corpus alone, or a corpus of one subject.
    """
    where, who = np.asarray(corpora), np.asarray(subjects)
    names = sorted(set(corpora))
    counts = {name: len(set(who[where == name])) for name in names}
    if len(names) < 2:
        raise UserError(f"clips of one corpus alone ({', '.join(names)}): there is no gap to measure")
    if min(counts.values()) < 2:
        raise UserError(
            f"corpus {min(names, key=lambda name: counts[name])} has clips of one subject; two or more are needed"
        )
    answers = np.empty(len(where), dtype=where.dtype)
    dealt = _dealt(where, who, min(FOLDS, *counts.values()), seed)
    for fold in np.unique(dealt):
        train, test = dealt != fold, dealt == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
        with warnings.catch_warnings():
            # Stopped at 500 iterations it is still a classifier that was fitted without the clips it answers.
            warnings.simplefilter("ignore", ConvergenceWarning)
            answers[test] = model.fit(features[train], where[train]).predict(features[test])
    right = answers == where
    accuracy = float(np.mean([right[where == name].mean() for name in names]))
    spread = _interval(right, where, who, names, resamples, seed) if resamples else None
    return Gap(accuracy, spread, 1 / len(names), len(where), sum(counts.values()))


def _dealt(where: np.ndarray, who: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each clip `[n]`: the subjects of each corpus are shuffled and dealt, so that every fold has
    some of each corpus and none is left without one to learn from."""
    generator = np.random.default_rng(seed)
    fold_of: dict[str, int] = {}
    for name in sorted(set(where.tolist())):
        people = generator.permutation(sorted(set(who[where == name].tolist())))
        fold_of |= {person: place % folds for place, person in enumerate(people.tolist())}
    return np.array([fold_of[person] for person in who.tolist()])


def _interval(
    right: np.ndarray, where: np.ndarray, who: np.ndarray, names: Sequence[str], resamples: int, seed: int
) -> tuple[float, float] | None:
    shares = np.zeros((resamples, len(names)))
    for column, name in enumerate(names):
        people, member = np.unique(who[where == name], return_inverse=True)
        drawn = subject_weights(len(people), resamples, seed + column)
        hits = np.bincount(member, weights=right[where == name], minlength=len(people))
        shares[:, column] = (drawn @ hits) / (drawn @ np.bincount(member, minlength=len(people)))
    pair = interval(shares.mean(axis=1))
    return None if pair is None else (pair[0], pair[1])


def embed(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lay features out in the plane with t-SNE.

    Features are standardised and reduced to 50 principal components first; of more than `MOST_POINTS` clips that many
    are drawn.

    Args:
        features: `[n, F]`.
        seed: of the draw and of t-SNE.

    Returns:
        Indices of the m clips that are shown, `[m]`, and their places, `[m, 2]`, which have no unit.

    Raises:
        UserError: there are too few clips.
    """
    if len(features) < _FEWEST_CLIPS:
        raise UserError(f"{len(features)} clips are too few for a t-SNE; {_FEWEST_CLIPS} or more are needed")
    shown = np.arange(len(features))
    if len(shown) > MOST_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(shown, MOST_POINTS, replace=False))
    scaled = StandardScaler().fit_transform(features[shown].astype(np.float64))
    components = min(_COMPONENTS, *scaled.shape)
    reduced = PCA(components, svd_solver="full").fit_transform(scaled)
    perplexity = min(_PERPLEXITY, (len(shown) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(reduced)
    return shown, places
