"""The synthetic corpus generator: bytes, layouts, workbook quirks, movement, independence of label and subject."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from aullm_dist.data.corpora import CORPORA, read_corpus
from aullm_dist.data.corpora.drawn import ClipPlan
from aullm_dist.data.corpora.samm import _intensity_letter
from aullm_dist.data.preparation.matching import plan_clips as plan_clips_on_disk
from aullm_dist.data.synthetic import DAMAGES, SPEC_FILE, Movement, SyntheticSpec, plan_clips, write_corpus
from aullm_dist.data.synthetic.faces import Subject
from aullm_dist.data.synthetic.labels import combination_weights
from aullm_dist.errors import UserError


def small(corpus: str, **changes: object) -> SyntheticSpec:
    values = {"subjects": 4, "clips_per_subject": 6, "num_frames": (6, 9), "frame_size": (48, 40)}
    return SyntheticSpec(corpus=corpus, **{**values, **changes})


def sheet_rows(root: Path) -> list[tuple]:
    (workbook,) = root.glob("*.xlsx")
    return list(openpyxl.load_workbook(workbook).active.iter_rows(values_only=True))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def clip_of(au: int, side: str = "both", **changes: object) -> ClipPlan:
    plan = ClipPlan(
        index=0, subject=0, ordinal=0, movements=(Movement(au, side, 1.0, 0.0),), onset=30, apex=34, offset=38,
        residual=0.2, emotion="others", apex_missing=False,
    )  # fmt: skip
    return replace(plan, **changes)


def still(**changes: object) -> SyntheticSpec:
    """A camera without jitter, flicker and noise, so that only AUs move."""
    values = {"jitter_pixels": 0.0, "flicker": 0.0, "noise": 0.0, "shift": "none", "frame_size": (96, 96)}
    return SyntheticSpec(corpus="casme2", **{**values, **changes})


@pytest.mark.parametrize("corpus", CORPORA)
def test_equal_specs_give_equal_bytes(corpus, tmp_path):
    size = {"subjects": 2, "clips_per_subject": 2, "num_frames": (5, 6), "frame_size": (32, 32)}
    first = contents(write_corpus(small(corpus, **size), tmp_path / "a"))
    assert first == contents(write_corpus(small(corpus, **size), tmp_path / "b"))
    other = contents(write_corpus(small(corpus, **size, seed=1), tmp_path / "c"))
    frames = [name for name in first if name.endswith((".jpg", ".png"))]
    assert frames
    assert all(first[name] != other[name] for name in frames if name in other)


def test_casme2_layout(tmp_path):
    spec = small("casme2")
    root = write_corpus(spec, tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header == (
        "Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units", "Estimated Emotion"
    )  # fmt: skip
    assert len(rows) == 24
    for subject, name, _, onset, _, offset, *_ in rows:
        assert isinstance(subject, int)
        assert re.fullmatch(r"EP\d\d_\d\df?", name)
        files = {p.name for p in (root / "CASME2_RAW_selected" / f"sub{subject:02d}" / name).iterdir()}
        assert files == {f"img{n}.jpg" for n in range(onset, offset + 1)}
        assert onset > 1
    assert any(onset < 1000 <= offset for _, _, _, onset, _, offset, *_ in rows)
    assert "/" in [row[4] for row in rows]
    cells = [row[7] for row in rows]
    assert any(isinstance(cell, int) for cell in cells)
    assert any("+" in str(cell) for cell in cells)
    assert any(re.search(r"[LR]\d", str(cell)) for cell in cells)
    with Image.open(next(root.rglob("*.jpg"))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 48))


def test_casme2_raw_has_frames_around_the_clip(tmp_path):
    root = write_corpus(small("casme2", context_frames=3), tmp_path / "corpus")
    subject, name, _, onset, _, offset, *_ = sheet_rows(root)[1]
    files = {p.name for p in (root / "CASME2-RAW" / f"sub{subject:02d}" / name).iterdir()}
    assert files == {f"img{n}.jpg" for n in range(onset - 3, offset + 4)}


def test_samm_layout(tmp_path):
    root = write_corpus(small("samm", subjects=5), tmp_path / "corpus")
    rows = sheet_rows(root)
    assert [row[0] for row in rows].index("Subject") == 13
    assert rows[13][:6] == ("Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame")
    paddings = Counter()
    for subject, name, _, onset, apex, offset, duration, *_ in rows[14:]:
        assert re.fullmatch(r"\d{3}", subject)
        assert re.fullmatch(rf"{subject}_\d+_\d+", name)
        assert onset <= apex <= offset
        assert duration == offset - onset + 1
        files = sorted(p.stem for p in (root / "SAMM" / subject / name).iterdir())
        assert [int(stem.removeprefix(f"{subject}_")) for stem in files] == list(range(onset, offset + 1))
        paddings[len(files[0].split("_")[1])] += 1
    assert paddings[5] > paddings[4] > 0
    cells = [row[8] for row in rows[14:]]
    assert any(re.fullmatch(r"A\d+[A-E]\+A\d+[A-E]", cell) for cell in cells)
    assert any(re.fullmatch(r"[LR]?\d+[A-E]", cell) for cell in cells)
    assert any(" + " in cell for cell in cells)
    with Image.open(next(root.rglob("*.jpg"))) as image:
        assert (image.format, image.mode) == ("JPEG", "L")


def test_fourdme_layout(tmp_path):
    spec = small("4dme")
    root = write_corpus(spec, tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header[:7] == ("sub_ID", "fold_name", "Onset", "Apex", "Offset", "Emotion", "AUs")
    assert header[-8:] == (
        "fold", "eye blink", "Positive", "Negative", "Surprise", "Repression", "Others", "Total"
    )  # fmt: skip
    for row, plan in zip(rows, plan_clips(spec), strict=True):
        cells = dict(zip(header, row, strict=True))
        folder = root / "gray_micro" / cells["sub_ID"] / cells["fold_name"]
        assert [int(p.stem) for p in sorted(folder.iterdir())] == list(range(cells["Onset"], cells["Offset"] + 1))
        assert cells["AUs"].count("AU") == 1
        assert {int(h[2:]) for h in header if re.fullmatch(r"AU\d+", h) and cells[h]} == set(plan.active_aus)
        assert cells["Total"] == len(plan.active_aus)
    assert any("(k)" in row[6] for row in rows)
    assert any(re.search(r"\+[LR]\d|AU[LR]\d", row[6]) for row in rows)
    assert any("+" in row[5] for row in rows)
    with Image.open(next(root.rglob("*.png"))) as image:
        assert image.mode == "L"


@pytest.mark.parametrize("corpus", CORPORA)
def test_ordinary_loader_reads_back_the_plan(corpus, tmp_path):
    spec = small(corpus, subjects=6, clips_per_subject=5, num_frames=(5, 6), frame_size=(32, 32))
    index = read_corpus(corpus, write_corpus(spec, tmp_path / "corpus"))
    plans = plan_clips(spec)
    assert [(r.onset, r.offset, r.aus) for r in index.records] == [(p.onset, p.offset, p.active_aus) for p in plans]
    assert all(
        r.apex == p.apex
        for r, p in zip(index.records, plans, strict=True)
        if not (p.apex_missing and corpus == "casme2") and corpus != "casme3c"
    )
    assert len({r.subject for r in index.records}) == spec.subjects
    assert all(r.folder is not None for r in index.records)
    assert not [note for note in index.notes if note.kind == "skipped"]
    assert all("apex missing" in note.text for note in index.notes if note.kind == "repaired")


TINY = {"subjects": 2, "clips_per_subject": 5, "num_frames": (5, 6), "frame_size": (32, 32)}


def test_casme_layout(tmp_path):
    root = write_corpus(small("casme", **TINY), tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header == (
        "Subject", "Filename", None, "OnsetF", "ApexF1", "ApexF2", "OffsetF", None, "AU", "Emotion"
    )  # fmt: skip
    names = []
    for subject, name, _, onset, _, _, offset, *_ in rows:
        folder = root / "CASME_raw_selected" / f"sub{subject:02d}" / name
        names.append({p.stem.removeprefix(f"{name}-") for p in folder.iterdir()})
        assert {int(stem) for stem in names[-1]} == set(range(onset, offset + 1))
    assert {len(stem) for stems in names[5:] for stem in stems} == {3}  # padded in the later part
    assert not any(stem.startswith("0") for stems in names[:5] for stem in stems)


def test_mmew_layout(tmp_path):
    root = write_corpus(small("mmew", **TINY), tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header[:5] == ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame")
    folders = {}
    for subject, name, onset, _, offset, _, emotion, _ in rows:
        assert re.fullmatch(rf"S{subject:02d}-\d\d-\d{{3}}", name)
        (folder,) = root.glob(f"Micro_Expression/*/{name}")
        folders.setdefault(emotion, set()).add(folder.parent.name)
        assert onset == 1
        assert {p.name for p in folder.iterdir()} == {f"{n}.jpg" for n in range(1, offset + 1)}
    assert folders.pop("others") == {"repression"}
    assert all(where == {emotion} for emotion, where in folders.items())


@pytest.mark.parametrize("context", [0, 2])
def test_casme3a_layout(tmp_path, context):
    root = write_corpus(small("casme3a", **TINY, context_frames=context), tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header == ("Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion")
    lost = 0
    for subject, video, onset, _, offset, *_ in rows:
        if context:
            folder = root / "part_A" / subject / video.lower() / "color"
        else:
            folder = root / "Part_A_ME_clip" / "frame" / f"{subject.replace('NO', 'No')}_{video.lower()}_{onset}"
        missing = set(range(onset - context, offset + context + 1)) - {int(p.stem) for p in folder.iterdir()}
        assert len(missing) <= 1
        lost += len(missing)
    assert lost == 1  # a dropped frame
    assert len({(subject, video.lower()) for subject, video, *_ in rows}) < len(rows)
    assert any(video.isupper() for _, video, *_ in rows)
    assert list(root.rglob("depth"))


def test_casme3c_layout(tmp_path):
    root = write_corpus(small("casme3c", **TINY), tmp_path / "corpus")
    header, *rows = sheet_rows(root)
    assert header == ("sub", "count", "onset", "offset", "au")
    for subject, count, onset, offset, _ in rows:
        files = {p.name for p in (root / "part_C" / f"{subject:02d}" / str(count)).iterdir()}
        assert files == {f"{n}.jpg" for n in range(onset, offset + 1)}
    assert sum("\uff0c" in str(row[4]) for row in rows) == 1


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_damaged_corpus_is_read_without_its_damaged_clips(corpus, tmp_path):
    root = write_corpus(small(corpus, **TINY), tmp_path / "corpus", damage=DAMAGES)
    with pytest.raises(UserError, match=r"row \d+.*allowed"):
        read_corpus(corpus, root)
    index = read_corpus(corpus, root, bad_rows="skip")
    plans, notes = plan_clips_on_disk(index, "repair")
    # Of ten clips the damage takes one row, spoils two and takes one folder; the others are kept.
    assert len(index.records) == 7
    assert len(plans) == 6
    told = [str(note) for note in (*index.notes, *notes)]
    parts = ["banana", "has a row already", "without a row", "no clip folder"]
    if corpus not in ("samm", "casme3c"):  # whose folders are called by numbers alone
        parts.append("another case of their names")
    assert [part for part in parts if not any(part in text for text in told)] == []
    assert len([note for note in notes if note.kind == "repaired"]) == (2 if corpus == "casme3a" else 1)


def test_damage_is_where_the_docstring_says(tmp_path):
    sound = write_corpus(small("casme2", **TINY), tmp_path / "sound")
    root = write_corpus(small("casme2", **TINY), tmp_path / "corpus", damage=DAMAGES)
    before, after = sheet_rows(sound)[1:], sheet_rows(root)[1:]
    folders = [root / "CASME2_RAW_selected" / f"sub{row[0]:02d}" / row[1] for row in before]
    assert len(list(folders[0].iterdir())) == before[0][5] - before[0][3]
    sizes = sorted(p.stat().st_size for p in folders[1].iterdir())
    assert sizes[0] == 40 < sizes[1]
    assert not folders[2].exists()
    assert folders[3].is_dir()
    assert before[3][:2] not in [row[:2] for row in after]
    assert after[3][7] == "banana"
    assert after[4][3] > after[4][5]
    assert after[5][:7] == after[6][:7]
    assert after[5][7] != after[6][7]
    assert not folders[7].exists()
    assert folders[7].with_name(folders[7].name.swapcase()).is_dir()


def test_root_is_kept_reused_or_refused(tmp_path):
    spec = small("casme2", subjects=2)
    root = write_corpus(spec, tmp_path / "corpus")
    marked = next(root.rglob("*.jpg"))
    time = marked.stat().st_mtime_ns
    assert write_corpus(spec, root) == root
    assert marked.stat().st_mtime_ns == time
    with pytest.raises(UserError, match="not empty"):
        write_corpus(replace(spec, seed=3), root)
    assert "No claim about real faces" in (root / SPEC_FILE).read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"corpus": "casme9"}, "corpus"),
        ({"amplitude_percent": -1.0}, "amplitude_percent"),
        ({"balance": 1.5}, "balance"),
        ({"balance": -0.1}, "balance"),
        ({"shift": "gama"}, "shift"),
        ({"num_frames": (20, 10)}, "num_frames"),
        ({"num_frames": (2, 4)}, "num_frames"),
        ({"frame_size": (8, 64)}, "frame_size"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_values_out_of_range_are_named(changes, key):
    with pytest.raises(UserError, match=f"{key} is .*allowed"):
        SyntheticSpec(**{"corpus": "casme2", **changes})


def test_amplitude_scales_the_movement():
    def change(amplitude: float) -> float:
        frames = Subject(still(amplitude_percent=amplitude), 0).render(clip_of(12)).astype(float)
        return float(np.abs(frames[4] - frames[0]).mean())

    none, one, two, four = (change(a) for a in (0.0, 1.0, 2.0, 4.0))
    assert none == 0.0
    assert 0.0 < one < two < four
    assert 1.5 < two / one < 2.5


def test_movement_follows_onset_apex_offset():
    frames = Subject(still(), 0).render(clip_of(4)).astype(float)
    change = np.abs(frames - frames[0]).mean(axis=(1, 2))
    assert change.argmax() == 4
    assert 0.0 < change[-1] < 0.5 * change[4]
    blink = Subject(still(), 0).render(clip_of(45)).astype(float)
    assert np.abs(blink[-1] - blink[0]).max() < 0.2 * np.abs(blink[4] - blink[0]).max()
    held = Subject(still(), 0).render(clip_of(4, movements=(Movement(4, "both", 1.0, 0.0, static=True),)))
    assert (held == held[0]).all()


@pytest.mark.parametrize(
    ("au", "rows"), [(1, slice(0, 48)), (7, slice(24, 54)), (12, slice(54, 92)), (17, slice(54, 96))]
)
def test_movement_is_local(au, rows):
    frames = Subject(still(), 1).render(clip_of(au)).astype(float)
    change = np.abs(frames[4] - frames[0])
    assert change[rows].sum() > 0.9 * change.sum()


def test_unilateral_labels_move_one_side():
    def halves(side: str) -> tuple[float, float]:
        frames = Subject(still(), 0).render(clip_of(12, side)).astype(float)
        change = np.abs(frames[4] - frames[0])
        return change[:, :48].sum(), change[:, 48:].sum()

    right_of_subject, left_of_subject = halves("right"), halves("left")
    assert right_of_subject[0] > 10 * right_of_subject[1]
    assert left_of_subject[1] > 10 * left_of_subject[0]


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_au_can_be_drawn(corpus):
    subject = Subject(small(corpus), 0)
    for au in sorted({au for combination in CORPORA[corpus].synthetic.combinations for au in combination}):
        frames = subject.render(clip_of(au))
        assert frames.shape == (9, 48, 40)


def test_a_seed_draws_the_face_that_it_drew_before():
    """Numbers of the docs were measured on these faces: who changes the faces on purpose measures again."""
    first = Subject(still(), 0).render(clip_of(4))[0].astype(float)
    assert first.reshape(6, 16, 6, 16).mean(axis=(1, 3)) == pytest.approx(
        np.array(
            [
                [74.2, 82.5, 67.6, 79.1, 90.3, 110.8],
                [77.1, 152.7, 178.1, 171.4, 146.9, 103.6],
                [109.5, 173.1, 157.5, 157.3, 152.2, 121.2],
                [122.7, 160.6, 159.6, 173.4, 161.5, 127.4],
                [128.7, 141.2, 149.2, 142.3, 139.5, 136.4],
                [131.8, 132.9, 135.2, 141.1, 136.3, 140.1],
            ]
        ),
        abs=0.2,
    )
    assert np.abs(np.diff(first, axis=1)).mean() == pytest.approx(5.21, abs=0.02)
    assert np.abs(np.diff(first, axis=0)).mean() == pytest.approx(6.10, abs=0.02)


def test_each_au_moves_what_it_moved_before():
    """By AU of the subject's left side: mean change in gray values at the apex, and row and column of its centre."""
    before = {
        1: (0.444, 33.0, 57.3), 2: (0.456, 34.0, 68.1), 4: (0.491, 34.0, 58.2), 5: (0.300, 40.3, 62.7),
        6: (0.234, 53.0, 65.9), 7: (0.227, 42.2, 62.9), 9: (0.293, 49.0, 53.3), 10: (0.395, 69.7, 53.3),
        12: (0.336, 70.9, 59.1), 14: (0.153, 71.4, 61.3), 15: (0.306, 72.2, 59.3), 17: (0.367, 77.4, 49.2),
        20: (0.181, 72.0, 60.6), 24: (0.296, 71.5, 48.7), 25: (0.311, 73.9, 49.0), 43: (0.500, 40.5, 62.7),
        45: (0.524, 40.5, 62.7),
    }  # fmt: skip
    subject = Subject(still(), 0)
    rows, columns = np.mgrid[:96, :96]
    for au, (mean, row, column) in before.items():
        frames = subject.render(clip_of(au, "left")).astype(float)
        change = np.abs(frames[4] - frames[0])
        assert change.mean() == pytest.approx(mean, abs=0.003), au
        centre = (change * rows).sum() / change.sum(), (change * columns).sum() / change.sum()
        assert centre == pytest.approx((row, column), abs=0.2), au


@pytest.mark.parametrize(
    ("corpus", "frames", "aus", "emotions", "drawn"),
    [
        ("casme", (28231, 518, 1036), (60, 0, 6), (1, 2, 14), (60.642, 10.523)),
        ("casme2", (49196, 1766, 3389), (75, 0, 6), (5, 2, 18), (75.846, 9.878)),
        ("samm", (134214, 1904, 3725), (62, 0, 6), (7, 2, 34), (59.986, 9.489)),
        ("4dme", (6176, 500, 1048), (86, 4, 6), (4, 6, 33), (84.746, 9.156)),
        ("mmew", (50, 940, 1854), (74, 0, 6), (5, 5, 24), (73.160, 10.413)),
        ("casme3a", (31653, 271, 544), (59, 0, 6), (1, 3, 24), (58.245, 8.832)),
        ("casme3c", (21510, 314, 599), (59, 0, 6), (0, 4, 28), (56.128, 10.157)),
    ],
)
def test_a_seed_plans_the_clips_that_it_planned_before(corpus, frames, aus, emotions, drawn):
    """Sums over 50 clips: onsets, frames to apex and offset; movements, static, one-sided; strengths, residuals."""
    clips = plan_clips(SyntheticSpec(corpus=corpus, subjects=5, clips_per_subject=10))
    assert frames == (
        sum(clip.onset for clip in clips),
        sum(clip.apex - clip.onset for clip in clips),
        sum(clip.offset - clip.onset for clip in clips),
    )
    assert sum(clip.apex_missing for clip in clips) == 4
    moves = [move for clip in clips for move in clip.movements]
    static = sum(any(move.static for move in clip.movements) for clip in clips)
    one_sided = sum(any(move.side != "both" for move in clip.movements) for clip in clips)
    assert aus == (len(moves), static, one_sided)
    spoken = Counter(clip.emotion for clip in clips)
    assert (spoken["happiness"], spoken["surprise"], spoken["others"]) == emotions
    sums = sum(move.strength for move in moves), sum(clip.residual for clip in clips)
    assert sums == pytest.approx(drawn, abs=0.001)


@pytest.mark.parametrize("shift", ["none", "corpus", "vignette_banding"])
def test_shift_changes_the_camera_and_not_the_labels(shift):
    spec = SyntheticSpec(corpus="samm", shift=shift)
    assert plan_clips(spec) == plan_clips(replace(spec, shift="none"))
    spec = replace(still(), corpus="samm", shift=shift)
    frames = Subject(spec, 0).render(clip_of(4)).astype(float)
    plain = Subject(replace(spec, shift="none"), 0).render(clip_of(4)).astype(float)
    assert (np.abs(frames - plain).mean() > 3.0) == (shift != "none")
    # Bands roll over the frame: even where nothing moves, rows change against each other from frame to frame.
    row_ratio = frames[1, :10].mean(axis=1) / frames[0, :10].mean(axis=1)
    assert (np.ptp(row_ratio) > 0.005) == (shift == "vignette_banding")


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_au_of_the_set_has_several_subjects(corpus):
    for balance in (0.0, 1.0):
        for seed in range(3):
            clips = plan_clips(
                SyntheticSpec(corpus=corpus, seed=seed, balance=balance, subjects=8, clips_per_subject=8)
            )
            for au in CORPORA[corpus].aus:
                assert len({clip.subject for clip in clips if au in clip.active_aus}) >= 2


def test_proportions_follow_the_field_or_are_flat():
    weights = combination_weights("casme2", 0.0)
    frequency = {au: sum(w for c, w in weights.items() if au in c) for au in CORPORA["casme2"].aus}
    # CASME II positives of 256 clips, as counted by the field's harness.
    published = {1: 26, 2: 22, 4: 130, 7: 39, 12: 34, 14: 27, 15: 16, 17: 25}
    assert all(abs(frequency[au] - count / 256) < 0.02 for au, count in published.items())
    for corpus in CORPORA:
        flat = combination_weights(corpus, 1.0)
        frequencies = [sum(w for c, w in flat.items() if au in c) for au in CORPORA[corpus].aus]
        assert max(frequencies) < 1.05 * min(frequencies)
        assert sum(flat.values()) == pytest.approx(1.0)


def test_labels_are_independent_of_the_subject():
    clips = plan_clips(SyntheticSpec(corpus="casme2", subjects=60, clips_per_subject=40, balance=1.0))
    for au in CORPORA["casme2"].aus:
        counts = Counter(clip.subject for clip in clips if au in clip.active_aus)
        rate = counts.total() / len(clips)
        chi2 = sum((counts[s] - 40 * rate) ** 2 for s in range(60)) / (40 * rate * (1.0 - rate))
        # 59 degrees of freedom: 30 to 100 leaves out less than 0.2% of chance, 0.1% either side.
        assert 30 < chi2 < 100
    assert all(len({c.active_aus for c in clips if c.subject == s}) > 5 for s in range(60))


def test_labels_do_not_show_in_the_first_frame():
    subject = Subject(small("casme2", amplitude_percent=6.0), 0)
    first = [subject.render(clip_of(au))[0] for au in (1, 4, 12, 15)]
    assert all((frame == first[0]).all() for frame in first)


def test_intensity_letters_rise_with_strength():
    letters = [_intensity_letter(Movement(4, "both", s, 0.0)) for s in (0.75, 0.9, 1.0, 1.1, 1.25)]
    assert letters == sorted(letters)
    assert set(letters) <= set("ABCDE")
