"""Splits clips by evaluation protocols: what a fold trains on, holds out for thresholds, and is tested on.

Every choice here is a function of sample ids, subject names, clip counts and the seed. Labels are never read, so a test
clip's labels cannot reach the training side of its fold. This module imports neither torch nor datasets.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from aullm_dist.data.corpora import corpus_names, find_corpus, get_corpus
from aullm_dist.errors import UserError
from aullm_dist.facs import CROSS_AUS
from aullm_dist.files import read_json, write_text

Protocol = Literal["loso", "grouped", "cross", "lodo", "composite", "all"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """What a protocol may know of a clip.

    `aus` travels along for reports and label arrays; nothing in this module reads it.
    """

    sample_id: str
    subject: str
    corpus: str
    aus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Sample ids of one fold, each tuple sorted.

    `inner` are whole subjects taken out of the training side, on which decision thresholds may be chosen.
    """

    index: int
    name: str
    train: tuple[str, ...]
    inner: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """The contents of `folds.json`: all folds of a run, also those that this process does not train."""

    protocol: Protocol
    corpora: tuple[str, ...]
    aus: tuple[int, ...]
    seed: int
    folds: tuple[Fold, ...]


def au_vocabulary(corpora: Iterable[str], protocol: Protocol) -> tuple[int, ...]:
    """Return the AUs under test: those shared by all corpora for `cross`, the 12 of CD6ME for `lodo` and `composite`,
    else those of any corpus.

    Raises:
        UserError: If a corpus or the protocol is unknown, or the corpora share no AU.

    Source:
        The AU sets of the corpora (`CorpusSpec.aus`), CD6ME's 12 (`facs.CROSS_AUS`) for `lodo`; those 12 for
        `composite`, and the union for several corpora in one fold of another protocol, are (ours).
    """
    names = sorted(set(corpora))
    _check_names(names, protocol)
    if protocol in ("lodo", "composite"):
        return CROSS_AUS
    sets = [set(get_corpus(name).aus) for name in names]
    shared = set.intersection(*sets) if protocol == "cross" else set.union(*sets)
    if not shared:
        raise UserError(f"corpora {', '.join(names)} share no AU; protocol cross needs corpora with common AUs")
    return tuple(sorted(shared))


def make_folds(
    samples: Sequence[SampleInfo],
    protocol: Protocol,
    *,
    seed: int = 0,
    inner_fraction: float = 0.15,
    num_folds: int = 5,
    train_corpora: Sequence[str] = (),
    test_corpora: Sequence[str] = (),
) -> tuple[Fold, ...]:
    """Split clips by whole subjects.

    Args:
        samples: All clips, in any order; the folds do not depend on the order.
        protocol: `loso` one fold per subject; `grouped` `num_folds` folds of whole subjects, about equal in clips;
            `cross` one fold from `train_corpora` to `test_corpora`; `lodo` one fold per corpus, tested on all of it and
            trained on all others; `composite` one fold per subject of several corpora, trained on all others of every
            corpus; `all` one fold without a test side.
        seed: Chooses inner subjects, and the grouping of `grouped`.
        inner_fraction: Share of a fold's training subjects held out, in [0, 1). Above 0 at least one subject is held
            out where there are 3 or more, and none where there are fewer.
        num_folds: Folds of `grouped`, between 2 and the number of subjects.
        train_corpora: Source corpora of `cross`.
        test_corpora: Target corpora of `cross`, disjoint from the source.

    Raises:
        UserError: On an unknown protocol or corpus, too few subjects, duplicate ids or an option out of range.
    """
    _check_samples(samples, protocol)
    if not 0 <= inner_fraction < 1:
        raise UserError(f"inner fraction {inner_fraction}: must be at least 0 and below 1")
    subjects = sorted({sample.subject for sample in samples})
    corpora = sorted({sample.corpus for sample in samples})
    if protocol in ("lodo", "composite") and len(corpora) < 2:
        raise UserError(f"protocol {protocol} needs at least 2 corpora, got {len(corpora)} ({', '.join(corpora)})")
    if protocol == "lodo":
        tests = [(name, {sample.subject for sample in samples if sample.corpus == name}) for name in corpora]
    elif protocol in ("loso", "composite"):
        if len(subjects) < 2:
            raise UserError(f"protocol loso needs at least 2 subjects, got {len(subjects)} ({', '.join(subjects)})")
        tests = [(subject, {subject}) for subject in subjects]
    elif protocol == "grouped":
        tests = _group_subjects(samples, num_folds, seed)
    elif protocol == "cross":
        samples, tests = _cross_corpora(samples, train_corpora, test_corpora)
    else:
        tests = [("all", set())]
    folds = tuple(
        _build_fold(index, name, samples, test, inner_fraction, seed) for index, (name, test) in enumerate(tests)
    )
    for fold in folds:
        _assert_subjects_apart(fold, samples)
    return folds


def select_fold(folds: Sequence[Fold], index: int) -> Fold:
    """Return fold `index`.

    Raises:
        UserError: If there is no such fold.
    """
    if not 0 <= index < len(folds):
        raise UserError(f"fold {index}: this protocol has {len(folds)} fold(s), allowed are 0 to {len(folds) - 1}")
    return folds[index]


def write_folds(path: Path, plan: FoldPlan) -> None:
    """Write `plan` as JSON, whole or not at all: names of clips and nothing else, one per line."""
    write_text(path, json.dumps(asdict(plan), indent=1) + "\n")


def plan_from_file(path: Path, samples: Sequence[SampleInfo]) -> FoldPlan:
    """Read folds that were written beforehand, by `aullm-dist folds` or by hand, for these clips.

    Raises:
        UserError: What `read_folds` raises, a clip that is not among `samples`, a subject on two sides of a fold, or a
            fold without training clips.
    """
    plan = read_folds(path)
    _check_names(plan.corpora, plan.protocol)
    subject_of = {sample.sample_id: sample.subject for sample in samples}
    for fold in plan.folds:
        sides = {"train": fold.train, "inner": fold.inner, "test": fold.test}
        where = f"{path}: fold {fold.index} ({fold.name})"
        for side, names in sides.items():
            unknown = [name for name in names if name not in subject_of]
            if unknown:
                raise UserError(f"{where}, {side}: clip {unknown[0]} is in none of the datasets given")
        if not fold.train:
            raise UserError(f"{where}: trains on nothing; allowed: at least one clip")
        people = {side: {subject_of[name] for name in names} for side, names in sides.items()}
        for one, two in (("train", "test"), ("train", "inner"), ("inner", "test")):
            if both := sorted(people[one] & people[two]):
                raise UserError(f"{where}: subject {both[0]} is on the sides {one} and {two}; a subject has one side")
    return plan


def read_folds(path: Path) -> FoldPlan:
    """Read what `write_folds` wrote and check that no clip is on two sides of a fold or tested twice.

    Raises:
        UserError: If the file is missing, is not such JSON, or its folds overlap.
    """
    raw = read_json(path, "give the folds of a run, or of aullm-dist folds")
    try:
        folds = tuple(
            Fold(int(f["index"]), str(f["name"]), tuple(f["train"]), tuple(f["inner"]), tuple(f["test"]))
            for f in raw["folds"]
        )
        plan = FoldPlan(raw["protocol"], tuple(raw["corpora"]), tuple(raw["aus"]), int(raw["seed"]), folds)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a fold plan of train.py ({type(error).__name__}: {error})") from None
    names = [name for fold in folds for name in (*fold.train, *fold.inner, *fold.test)]
    lists = [raw["corpora"], raw["aus"], *(f[side] for f in raw["folds"] for side in ("train", "inner", "test"))]
    if not all(isinstance(item, list) for item in lists) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: key folds: train, inner and test must be lists of sample ids")
    if not plan.aus or not all(type(au) is int and au > 0 for au in plan.aus) or len(set(plan.aus)) < len(plan.aus):
        raise UserError(f"{path}: key aus: {raw['aus']!r:.80}; must list different AU numbers")
    if [fold.index for fold in folds] != list(range(len(folds))) or not folds:
        raise UserError(f"{path}: key folds: indices must run from 0 without gaps, and there must be at least one fold")
    tested: set[str] = set()
    for fold in folds:
        counts = Counter(fold.train + fold.inner + fold.test)
        twice = sorted(name for name, count in counts.items() if count > 1) or sorted(tested & set(fold.test))
        if twice:
            raise UserError(f"{path}: fold {fold.index}: clip {twice[0]} is listed twice; a clip has one place")
        tested.update(fold.test)
    return plan


def _check_names(corpora: Sequence[str], protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is unknown; allowed are {', '.join(PROTOCOLS)}")
    if not corpora:
        raise UserError("no corpus given; a protocol needs at least one prepared dataset with clips")
    for name in corpora:
        if find_corpus(name) is None:
            raise UserError(f"corpus {name!r} is unknown; allowed are {', '.join(corpus_names())}")


def _check_samples(samples: Sequence[SampleInfo], protocol: str) -> None:
    _check_names(sorted({sample.corpus for sample in samples}), protocol)
    seen: set[str] = set()
    for sample in samples:
        if sample.sample_id in seen:
            raise UserError(f"sample id {sample.sample_id} occurs twice; ids must be unique over all corpora")
        seen.add(sample.sample_id)
        # Ids of CASME, CASME II and SAMM overlap as strings; unqualified they would merge different people.
        if not sample.subject.startswith(f"{sample.corpus}/"):
            raise UserError(f"{sample.sample_id}: subject {sample.subject!r} must start with '{sample.corpus}/'")


def _rank(*parts: object) -> str:
    """Return a sort key that is the same in every process, unlike `hash`."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def _group_subjects(samples: Sequence[SampleInfo], num_folds: int, seed: int) -> list[tuple[str, set[str]]]:
    """Give subjects to the lightest group, large ones first.

    Sizes are compared by powers of two, so that the seed changes the grouping and not only ties. Balance is by clip
    count alone: balancing AU positives would let test labels decide who is trained on.
    """
    sizes = Counter(sample.subject for sample in samples)
    if not 2 <= num_folds <= len(sizes):
        raise UserError(f"{num_folds} folds: protocol grouped takes 2 up to the number of subjects, {len(sizes)}")
    order = sorted(sizes, key=lambda subject: (-sizes[subject].bit_length(), _rank(seed, "group", subject)))
    groups: list[set[str]] = [set() for _ in range(num_folds)]
    loads = [(0, 0)] * num_folds
    for subject in order:
        lightest = min(range(num_folds), key=lambda k: (loads[k], k))
        groups[lightest].add(subject)
        clips, members = loads[lightest]
        loads[lightest] = (clips + sizes[subject], members + 1)
    return [(f"group-{k:02d}", group) for k, group in enumerate(groups)]


def _cross_corpora(
    samples: Sequence[SampleInfo], train_corpora: Sequence[str], test_corpora: Sequence[str]
) -> tuple[list[SampleInfo], list[tuple[str, set[str]]]]:
    source, target = set(train_corpora), set(test_corpora)
    present = {sample.corpus for sample in samples}
    if not source or not target:
        raise UserError("protocol cross needs a training corpus and a test corpus")
    _check_names(sorted(source | target), "cross")
    if source & target:
        raise UserError(f"protocol cross: corpus {min(source & target)} is on both sides; the two sides must differ")
    if absent := sorted((source | target) - present):
        raise UserError(
            f"protocol cross: no clips of corpus {absent[0]}; the datasets given hold {', '.join(sorted(present))}"
        )
    kept = [sample for sample in samples if sample.corpus in source | target]
    name = f"{'+'.join(sorted(source))}->{'+'.join(sorted(target))}"
    return kept, [(name, {sample.subject for sample in kept if sample.corpus in target})]


def _inner_subjects(subjects: Iterable[str], fold_name: str, fraction: float, seed: int) -> set[str]:
    """Choose inner subjects by seed, fold and name.

    The fold's name takes part, so that over LOSO folds every subject is trained on in most folds instead of the same
    few being held out in all of them.
    """
    ranked = sorted(subjects, key=lambda subject: _rank(seed, "inner", fold_name, subject))
    if fraction == 0 or len(ranked) < 3:
        return set()
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    return set(ranked[:count])


def _build_fold(
    index: int, name: str, samples: Sequence[SampleInfo], test: set[str], fraction: float, seed: int
) -> Fold:
    training = {sample.subject for sample in samples} - test
    inner = _inner_subjects(training, name, fraction, seed)
    sides: dict[str, list[str]] = {"train": [], "inner": [], "test": []}
    for sample in samples:
        side = "test" if sample.subject in test else "inner" if sample.subject in inner else "train"
        sides[side].append(sample.sample_id)
    return Fold(index, name, *(tuple(sorted(sides[side])) for side in ("train", "inner", "test")))


def _assert_subjects_apart(fold: Fold, samples: Sequence[SampleInfo]) -> None:
    subject_of = {sample.sample_id: sample.subject for sample in samples}
    sides = [{subject_of[sample_id] for sample_id in side} for side in (fold.train, fold.inner, fold.test)]
    assert sides[0], f"fold {fold.name} trains on nothing"
    assert sum(map(len, sides)) == len(set.union(*sides)), f"fold {fold.name} has a subject on two sides"
