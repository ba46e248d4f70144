"""Prepared datasets carry the hashes of their files, and whoever opens one compares them."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
from corpus_fixtures import make_casme2

from aullm_dist import log
from aullm_dist.cli import main
from aullm_dist.data.clips import ClipStore, clip_of_row, read_samples
from aullm_dist.data.manifest import verify_dataset
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("datasets")
    root = make_casme2(top / "release")
    for fmt in ("arrow", "parquet"):
        prepare("casme2", root, top / fmt, PrepareOptions(size=16, num_workers=1, fmt=fmt))
    return {fmt: top / fmt for fmt in ("arrow", "parquet")}


@pytest.fixture(params=["arrow", "parquet"])
def dataset(request, prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared[request.param], tmp_path / request.param))


def test_a_dataset_as_it_was_prepared_is_valid(dataset, capsys):
    assert main(["dataset", "verify", str(dataset)]) == 0
    assert capsys.readouterr().out.startswith(f"valid   {dataset}  ")
    assert ClipStore([dataset], 16).samples
    assert main(["dataset", "verify", "--mode", "size", str(dataset)]) == 0


def damage_zeros(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20) if any(content[middle : middle + 20]) else b"x" * 20
    file.write_bytes(bytes(content))


def damage_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def damage_gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [damage_zeros, damage_short, damage_gone])
def test_every_file_is_compared(dataset, damage, capsys):
    for name in sorted(path.name for path in dataset.iterdir()):
        copy = Path(shutil.copytree(dataset, dataset.parent / f"copy-{name}"))
        damage(copy / name)
        if name == "MANIFEST.json" and damage is damage_gone:
            continue
        assert main(["dataset", "verify", str(copy)]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"DAMAGED {copy}\n  {copy / name}: ")
        with pytest.raises(UserError) as caught:
            ClipStore([copy], 16)
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_of_the_dataset_is_refused(prepared, tmp_path):
    copy = Path(shutil.copytree(prepared["parquet"], tmp_path / "copy"))
    shutil.copy(copy / "clips-00000.parquet", copy / "clips-00001.parquet")
    with pytest.raises(UserError, match=r"clips-00001.parquet: is not of this dataset; move it away"):
        ClipStore([copy], 16)


def test_a_dataset_of_an_earlier_version_is_read_and_told(dataset, capsys):
    (dataset / "MANIFEST.json").unlink()
    log.set_up()
    assert len(ClipStore([dataset], 16).samples) == 4
    assert capsys.readouterr().err == (
        f"{dataset}: prepared without hashes: damage on disk would not show; prepare it again to have them\n"
    )
    assert main(["dataset", "verify", str(dataset)]) == 1
    assert capsys.readouterr().out == f"unknown {dataset}  prepared without hashes; prepare it again to have them\n"
    assert verify_dataset(dataset) is None


def test_one_process_of_a_machine_reads_the_files(dataset, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    damage_zeros(dataset / "MANIFEST.json")
    assert ClipStore([dataset], 16).samples
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="damaged"):
        ClipStore([dataset], 16)


def test_verify_takes_datasets_alone(tmp_path, capsys):
    assert main(["dataset", "verify", str(tmp_path)]) == 2
    assert "no prepared dataset; allowed: a folder that aullm-dist prepare wrote" in capsys.readouterr().err


def test_feature_types_of_a_newer_datasets_are_no_damage(prepared, tmp_path):
    copy = Path(shutil.copytree(prepared["arrow"], tmp_path / "copy"))
    (copy / "MANIFEST.json").unlink()
    info = json.loads((copy / "dataset_info.json").read_text())
    info["features"]["aus"]["_type"] = "Tomorrow"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"datasets {datasets.__version__} does not know .*update datasets"):
        read_samples([copy])


def test_a_row_that_contradicts_itself_is_refused(prepared):
    row = dict(datasets.load_from_disk(str(prepared["arrow"]))[0])
    for change in ({"frames": row["frames"][:-1]}, {"num_frames": 3}, {"frame_numbers": [1]}):
        with pytest.raises(UserError, match="the dataset is damaged"):
            clip_of_row({**row, **change})


def test_damage_anywhere_never_ends_in_a_traceback(dataset):
    """Without its manifest too: what Arrow and datasets raise over damaged files is told in a line."""
    (dataset / "MANIFEST.json").unlink()
    rng = random.Random(0)
    files = sorted(path for path in dataset.iterdir())
    for _ in range(40):
        file = rng.choice(files)
        whole = file.read_bytes()
        content = bytearray(whole)
        start = rng.randrange(len(content))
        content[start : start + rng.choice([1, 16, 300])] = rng.randbytes(rng.choice([1, 16, 300]))
        file.write_bytes(bytes(content))
        try:
            store = ClipStore([dataset], 16)
            view = store.view([sample.sample_id for sample in store.samples])
            for index in range(len(view)):
                view.clip(index)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - whether it is refused depends on the byte
        file.write_bytes(whole)
