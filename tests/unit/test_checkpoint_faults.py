"""Checkpoints on full disks, under kills, and when old ones are let go."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
from checkpoint_samples import (
    NoLLM,
    build,
    flip,
    load_checkpoint,
    save,
    snapshot,
    train,
)

from aullm_dist.checkpoint import store as checkpoint_module
from aullm_dist.checkpoint.atomic import staged_folder
from aullm_dist.checkpoint.manifest import verify_checkpoint
from aullm_dist.checkpoint.retention import find_newest_valid, list_checkpoints, rotate
from aullm_dist.errors import CheckpointError, UserError


def test_processes_that_do_not_write_touch_no_disk(tmp_path):
    model, optimizer = build()
    folder = save(tmp_path / "run", 7, model, optimizer, is_writer=False)
    assert folder == tmp_path / "run" / "step-00000007"
    assert not (tmp_path / "run").exists()


def test_a_rename_that_fails_brings_the_old_checkpoint_back(two_checkpoints, tmp_path, monkeypatch):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    folder, rename = root / "step-00000002", os.rename
    (folder / "mark").write_text("the old one")

    def refuse(source, target):
        if Path(target) == folder and Path(source).name.startswith(".step-00000002.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"), staged_folder(folder) as staging:
        (staging / "file").write_text("the new one")
    assert (folder / "mark").read_text() == "the old one"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("target", ["save_file", "write_durably", "write_manifest"])
def test_full_disk_leaves_earlier_checkpoints_and_no_rest(two_checkpoints, tmp_path, monkeypatch, target):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    model, optimizer = build()
    train(model, optimizer, 0, 3)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, target, full)
    with pytest.raises(CheckpointError, match="step-00000003 could not be written.*No space left"):
        save(root, 3, model, optimizer)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


class Killed(BaseException):
    """The process is gone: from here on nothing reaches the disk, no clean-up either."""


def _kill_at(monkeypatch, operation: int) -> None:
    """Let the process die just before its `operation`-th change of the file system."""
    done = 0

    def guard(function):
        def guarded(*args, **kwargs):
            nonlocal done
            done += 1
            if done >= operation:
                raise Killed
            return function(*args, **kwargs)

        return guarded

    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, guard(getattr(module, name)))
    monkeypatch.setattr(checkpoint_module, "save_file", guard(checkpoint_module.save_file))


def test_save_killed_between_any_two_file_operations_loses_nothing(two_checkpoints, tmp_path, monkeypatch):
    """Saves step 2 again, so that the moments between the two renames of a replacement are among them."""
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    marker = {"again": True}
    outcomes = []
    for operation in range(1, 100):
        root = shutil.copytree(two_checkpoints, tmp_path / f"run{operation}")
        shutil.rmtree(root / "step-00000001")
        with monkeypatch.context() as patch:
            _kill_at(patch, operation)
            try:
                save(root, 2, model, optimizer, state=marker)
                break
            except Killed:
                pass
        found = find_newest_valid(root)
        assert found is not None, operation
        fresh, fresh_optimizer = build(seed=1)
        outcomes.append(load_checkpoint(found, fresh, fresh_optimizer).get("again", False))
        assert snapshot(fresh, fresh_optimizer) == snapshot(model, optimizer)
        save(root, 3, fresh, fresh_optimizer)
        assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
        assert verify_checkpoint(root / "step-00000002") == []
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def test_exception_during_a_save_leaves_no_folder(tmp_path, monkeypatch):
    model, optimizer = build()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 0, model, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_of_the_same_step_is_replaced(two_checkpoints, tmp_path):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    flip(root / "step-00000002" / "optimizer.safetensors")
    model, optimizer = build()
    load_checkpoint(find_newest_valid(root), model, optimizer)
    train(model, optimizer, 1, 2)
    save(root, 2, model, optimizer)
    assert verify_checkpoint(root / "step-00000002") == []
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    model = NoLLM()
    for step in range(6):
        save(tmp_path, step, model, None, base=None)
    gone = rotate(tmp_path, 2, protect=[tmp_path / "step-00000001"])
    assert [path.name for path in gone] == ["step-00000000", "step-00000002", "step-00000003"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000004", "step-00000005"]
    assert rotate(tmp_path, 9) == []
    assert [path.name for path in rotate(tmp_path, 1)] == ["step-00000001", "step-00000004"]
    with pytest.raises(UserError, match="allowed is 1 or more"):
        rotate(tmp_path, 0)


def test_rotation_never_deletes_the_last_valid_checkpoint(tmp_path):
    model = NoLLM()
    for step in range(4):
        save(tmp_path, step, model, None, base=None)
    for step in (2, 3):
        flip(tmp_path / f"step-0000000{step}" / "aullm_modules.safetensors")
    assert [path.name for path in rotate(tmp_path, 2)] == ["step-00000000"]
    assert find_newest_valid(tmp_path) == tmp_path / "step-00000001"


def test_rotation_that_cannot_delete_only_warns(tmp_path, monkeypatch, caplog):
    for step in range(3):
        save(tmp_path, step, NoLLM(), None, base=None)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(logging.getLogger("aullm_dist"), "propagate", True)  # another test may have set logging up
    with caplog.at_level(logging.WARNING, "aullm_dist"):
        assert rotate(tmp_path, 2) == []
    assert len(list_checkpoints(tmp_path)) == 3
    assert "step-00000000 could not be deleted: Permission denied" in caplog.text
