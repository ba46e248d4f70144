"""A run that does not fit is refused at its start, in one line, before anything of it is there."""

import logging
from types import SimpleNamespace

import pytest
import torch

from aullm_dist.config import load
from aullm_dist.errors import UserError
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.training import fitting

AUS = (1, 2, 4, 12)
MIB = 2**20


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return build_tiny_backbone(tmp_path_factory.mktemp("llm") / "llama", layers=2, hidden=64)


def _config(llm, *settings):
    few = ["model.structure=false", "model.readout=last", "model.lora_targets=[q_proj]"]
    return load(None, [f"model.llm={llm}", "training.micro_batch=1", "training.global_batch=1", *few, *settings])


def _refuse(llm, monkeypatch, gpu, host, *settings):
    """Run the check of a process that finds so much memory."""
    monkeypatch.setattr(fitting, "_free", lambda _: (gpu, host))
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    fitting.refuse_what_does_not_fit(accelerator, _config(llm, *settings), AUS, str(llm))


@pytest.mark.parametrize(
    ("gpu", "host", "settings", "part"),
    [
        (None, 16 * MIB, [], "each process needs"),
        (16 * MIB, 2**40, [], "each GPU needs"),
        (2**40, 16 * MIB, ["training.strategy=zero2_offload"], "each machine needs"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_missing(llm, monkeypatch, gpu, host, settings, part):
    with pytest.raises(UserError, match=f"the run does not fit: {part} .* more than its 16 MiB.*change") as refused:
        _refuse(llm, monkeypatch, gpu, host, *settings)
    assert "\n" not in str(refused.value)


def test_what_fits_is_told(llm, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="aullm_dist"):
        _refuse(llm, monkeypatch, None, 2**34)
    assert "Memory: planned at most" in caplog.text


def test_nobody_plans_what_is_not_asked_for(llm, monkeypatch):
    _refuse(llm, monkeypatch, None, 1, "training.check_memory=false")
    monkeypatch.setattr(fitting, "_free", None)
    for name in ("tiny", "none"):
        config = load(None, [f"model.llm={name}", "model.readout=last"])
        fitting.refuse_what_does_not_fit(SimpleNamespace(), config, AUS, str(llm))


def test_free_memory_is_the_least_of_all_processes(monkeypatch):
    rows = [(7, 90), (5, None), (9, 80)]
    monkeypatch.setattr(fitting, "gather_object", lambda mine: rows)
    monkeypatch.setattr(fitting, "free_machine_memory", lambda: 90)
    accelerator = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    assert fitting._free(accelerator) == (5, 80)


def test_a_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 64 kB\n")
    (tmp_path / "self").write_text("0::/job/step\n")
    group = tmp_path / "cgroup" / "job" / "step"
    group.mkdir(parents=True)
    for name, path in (("_MEMINFO", "meminfo"), ("_CGROUP_OF_SELF", "self"), ("_CGROUPS", "cgroup")):
        monkeypatch.setattr(fitting, name, tmp_path / path)
    assert fitting.free_machine_memory() == 64 * 1024
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("40000\n")
    (group.parent / "memory.stat").write_text("anon 9000\nfile 30000\nshmem 1000\n")
    assert fitting.free_machine_memory() == 30000
    monkeypatch.setattr(fitting, "_MEMINFO", tmp_path / "nowhere")
    assert fitting.free_machine_memory() is None
