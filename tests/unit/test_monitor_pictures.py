"""Norms of LoRA updates, clips to show, what is made of them, the files of the projector, the view over all folds."""

import dataclasses
import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aullm_dist.config import load, to_dict
from aullm_dist.data.clips import ClipStore, most_changed
from aullm_dist.data.protocols import Fold, FoldPlan, write_folds
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.monitoring.device import Power, flops_per_token, peak_flops
from aullm_dist.monitoring.explained import Explainer, choose_clips
from aullm_dist.monitoring.lora import norms_of_layers, update_norms
from aullm_dist.monitoring.overview import write_overview
from aullm_dist.monitoring.projector import principal_components, write_projector
from aullm_dist.release.predicting import views_of
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import StoredPrediction, write_predictions
from aullm_dist.training.build import build_model

AUS = (1, 2, 4, 7, 12)


@pytest.fixture(scope="module")
def built(tiny_llm):
    config = load(None, [f"model.llm={tiny_llm}", "model.lora_rank=3", "training.micro_batch=4"])
    built = build_model(config, AUS, tiny_llm)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return config, built


def test_norms_are_those_of_the_products(built):
    _, built = built
    table = update_norms(built.model)
    assert set(table) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    modules = dict(built.model.named_modules())
    for layer in (0, 1):
        (name,) = [n for n in modules if n.endswith(f"layers.{layer}.mlp.up_proj")]
        product = modules[name].get_delta_weight("default")
        assert table["up_proj"][layer] == pytest.approx(torch.linalg.norm(product).item(), rel=1e-5)
    whole = norms_of_layers(table)
    assert whole[1] == pytest.approx(np.sqrt(sum(row[1] ** 2 for row in table.values())))


def test_operations_of_a_token_are_those_of_the_linear_layers(built):
    _, built = built
    weights = {name: p.numel() for name, p in built.model.reasoner.llm.named_parameters() if ".layers." in name}
    lora = sum(n for name, n in weights.items() if "lora_" in name)
    frozen = sum(n for name, n in weights.items() if "base_layer" in name)
    assert lora
    assert flops_per_token(built.model) == 4 * frozen + 6 * lora
    assert flops_per_token(built.model.visual) == 0


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H200", "fp32", 67e12),
     ("NVIDIA A10G", "bf16", 70e12), ("Some other GPU", "bf16", None)],
)  # fmt: skip
def test_peaks_of_known_gpus(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None
    assert Power(torch.device("cpu")).watts() == {}


class NVML:
    """Stands for pynvml."""

    class NVMLError(Exception):
        """What it raises."""

    def __init__(self, watts):
        self.watts = watts

    def nvmlInit(self):
        if self.watts is None:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, identity):
        return identity

    def nvmlDeviceGetPowerUsage(self, handle):
        assert handle == b"GPU-01ab"
        if not self.watts:
            raise self.NVMLError("GPU is lost")
        return self.watts.pop(0)


def test_power_is_logged_where_nvml_tells_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="01ab"))
    gpu = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "pynvml", NVML([312_500]))
    power = Power(gpu)
    assert power.watts() == {"power_watts": 312.5}
    assert power.watts() == {} == power.watts(), "a GPU that is lost stops nothing here"
    monkeypatch.setitem(sys.modules, "pynvml", NVML(None))
    assert Power(gpu).watts() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Power(gpu).watts() == {}


def test_the_first_clips_show_many_aus_and_the_others_lie_evenly():
    labels = np.zeros((20, 3))
    labels[3, 0] = labels[9, 1] = labels[9, 2] = labels[15, 0] = 1
    chosen = choose_clips(labels, 3, 8)
    assert chosen[:2] == [9, 3]
    assert len(set(chosen)) == 8
    assert chosen == choose_clips(labels, 3, 8)
    assert chosen[3] == 0
    assert chosen[-1] == 19
    assert choose_clips(labels[:2], 4, 200) == [0, 1]
    assert choose_clips(labels, 0, 2) == [0, 19]
    assert choose_clips(labels, 4, 0) == choose_clips(labels, 4, 4)


@pytest.fixture
def explainer(built, tiny_dataset):
    config, built = built
    store = ClipStore([tiny_dataset], 64)
    view = store.view([sample.sample_id for sample in store.samples][:7])

    def make(accelerator=None, chosen=(5, 0, 3, 6, 1), drawn=2):
        stream = built.model.stream
        return Explainer(accelerator or Accelerator(cpu=True), config, built.relations, view, chosen, drawn, stream)

    return make, built


def test_twins_are_explained_beside_the_clips(explainer):
    make, built = explainer
    one = make()
    ticks = []
    built.model.train()
    given = one.explain(built.model, lambda: ticks.append(1))
    assert built.model.training
    assert len(ticks) == 3, "5 clips, 2 without movement and 2 edited, 4 at a time"
    views = views_of(np.stack([one.frames(place) for place in range(5)]), built.model.stream)
    plain = built.model.eval().explain(views)
    np.testing.assert_allclose(given.factual["hidden"], plain.hidden.numpy(), atol=1e-5)
    np.testing.assert_allclose(given.factual["evidence"], plain.evidence.mean(dim=1).numpy(), atol=1e-6)
    assert len(given.neutral["strengths"]) == len(given.edited["strengths"]) == 2
    assert np.abs(given.neutral["strengths"] - given.factual["strengths"][:2]).max() > 1e-5
    np.testing.assert_allclose(given.edited["strengths"], given.factual["strengths"][:2], atol=1e-5)
    cut = built.relations.prior_mask & ~given.mask
    assert cut.any()
    assert (given.edited["influence"][:, cut] == 0).all()
    assert (given.factual["influence"][:, cut] != 0).all()


def test_the_late_frame_is_the_annotated_apex_where_there_is_one(explainer, monkeypatch):
    make, _ = explainer
    one = make()
    clip = one._view.clip(5)
    assert clip.apex in clip.frame_numbers[1:-1]
    frame, what = one.late_frame(0)
    assert what == "apex"
    np.testing.assert_array_equal(frame, clip.frames[clip.frame_numbers.tolist().index(clip.apex)] / np.float32(255))
    for apex in (None, 10**6):
        monkeypatch.setattr(one._view, "clip", lambda index, apex=apex: dataclasses.replace(clip, apex=apex))
        frame, what = one.late_frame(0)
        assert what == "largest change"
        index = most_changed(clip)
        assert index > 0
        np.testing.assert_array_equal(frame, clip.frames[index] / np.float32(255))


class Rank:
    """An accelerator of one of several processes."""

    is_main_process = True
    device = torch.device("cpu")

    def __init__(self, rank, processes):
        self.process_index, self.num_processes = rank, processes

    def unwrap_model(self, model):
        return model


def test_processes_share_the_clips_and_pass_as_often(explainer, monkeypatch):
    """Under ZeRO-3 a forward pass gathers parameters, so every process must make as many of them."""
    make, built = explainer
    shares, ticks = [], []
    monkeypatch.setattr(
        "aullm_dist.monitoring.explained.gather_objects", lambda _, found: shares.append(found) or found
    )
    for rank in range(2):
        count = len(ticks)
        with pytest.raises(KeyError):  # the other half of the clips is elsewhere
            make(Rank(rank, 2)).explain(built.model, lambda: ticks.append(1))
        assert len(ticks) - count == 2
    monkeypatch.setattr("aullm_dist.monitoring.explained.gather_objects", lambda *_: shares[0] + shares[1])
    several = make(Rank(0, 2)).explain(built.model)
    monkeypatch.undo()
    alone = make().explain(built.model)
    for name, values in alone.factual.items():
        np.testing.assert_allclose(several.factual[name], values, atol=1e-5)
    np.testing.assert_allclose(several.edited["influence"], alone.edited["influence"], atol=1e-5)


def test_components_keep_the_distances():
    values = np.random.default_rng(0).normal(size=(9, 40))
    reduced = principal_components(values, 50)
    assert reduced.shape == (9, 9)
    distances = [np.linalg.norm(v[:, None] - v[None], axis=-1) for v in (values, reduced)]
    np.testing.assert_allclose(*distances, atol=1e-9)


def test_the_projector_is_renewed_in_its_place(tmp_path):
    frames = np.zeros((5, 64, 64))
    frames[3] = 1.0
    for count in (3, 5):
        rows = [[f"clip\t{i}", f"sub{i}"] for i in range(count)]
        vectors = {"content_token": np.eye(5)[:count]}
        write_projector(tmp_path, vectors, ("clip", "subject"), rows, frames[:count])
    folder = tmp_path / "projector"
    assert (folder / "metadata.tsv").read_text().splitlines()[1:3] == ["clip 0\tsub0", "clip 1\tsub1"]
    assert len((folder / "content_token.tsv").read_text().splitlines()) == 5
    sprite = np.array(Image.open(folder / "sprite.png"))
    assert sprite.shape == (96, 96)
    assert sprite[32:64, :32].min() == 255
    assert sprite.sum() == 255 * 32 * 32
    text = (tmp_path / "projector_config.pbtxt").read_text()
    assert "single_image_dim: 32 single_image_dim: 32" in text
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(folder.iterdir())) == 3
    write_projector(tmp_path, vectors, ("clip", "subject"), rows, None)
    assert "sprite" not in (tmp_path / "projector_config.pbtxt").read_text()


def test_all_folds_are_pooled_in_one_view(tmp_path):
    folds = tuple(Fold(i, f"sub{i}", ("x/9",), (), (f"x/{i}a", f"x/{i}b")) for i in range(3))
    write_folds(tmp_path / "folds.json", FoldPlan("loso", ("casme2",), (1, 4), 0, folds))
    config, rng = load(None, []), np.random.default_rng(0)

    def answer(fold):
        rows = [
            StoredPrediction(name, f"sub{fold}", "casme2", fold, "test", (i, 1 - i), tuple(rng.normal(size=2)))
            for i, name in enumerate(folds[fold].test)
        ]
        write_predictions(FoldPaths(tmp_path, fold).predictions(3), rows, aus=(1, 4), epoch=3, step=9)
        write_overview(tmp_path, config)
        return rows

    folder = tmp_path / "tensorboard" / "all-folds"
    kept = answer(2)
    live = EventAccumulator(str(folder))
    live.Reload()
    kept += answer(0)
    events = EventAccumulator(str(folder))
    events.Reload()
    live.Reload()
    assert [event.step for event in live.Scalars("pooled/f1_macro")] == [1, 2], "a TensorBoard that was open all along"
    labels, logits = (np.array([getattr(row, field) for row in kept]) for field in ("labels", "logits"))
    pooled = events.Scalars("pooled/f1_macro")
    assert [event.step for event in pooled] == [1, 2]
    assert pooled[-1].value == pytest.approx(summarise((labels, logits), (1, 4))["mean"]["f1_macro"])
    assert len(events.Scalars("fold_alone/f1_macro")) == 2
    assert [event.value for event in events.Scalars("progress/folds_in_all")] == [3, 3]
    text = events.Tensors("folds/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| pooled | 4 |" in text
    assert "synthetic" not in text, "a run that does not say"
    (tmp_path / "config.yaml").write_text(json.dumps(to_dict(config)) + "\n")
    write_overview(tmp_path, config)
    events.Reload()
    text = events.Tensors("folds/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "**Note: the faces are synthetic" in text
    for _ in range(5):
        write_overview(tmp_path, config)
    assert len(list(folder.iterdir())) == 5


def test_a_view_that_cannot_be_made_stops_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aullm_dist"), "propagate", True)
    write_overview(tmp_path, load(None, []))
    (tmp_path / "fold-00" / "predictions").mkdir(parents=True)
    (tmp_path / "fold-00" / "predictions" / "epoch-0001.jsonl").write_text(json.dumps({"aus": []}))
    write_overview(tmp_path, load(None, []))
    assert not (tmp_path / "tensorboard").exists()
    said = {record.getMessage() for record in caplog.records}
    assert sum("the view over all folds is not written" in message for message in said) == 2
