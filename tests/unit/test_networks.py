"""Networks without an LLM: the shipped ones by name, and a user's own by its import path."""

import numpy as np
import pytest
import torch
from torch import nn

from aullm_dist.commands.train import baseline_config
from aullm_dist.config import NETWORKS, load
from aullm_dist.data.clips import Clip
from aullm_dist.data.flow import RAW_FLOW, clip_flow, strain_of
from aullm_dist.data.views import frames_for, onset_apex_image, view_of, view_shape
from aullm_dist.errors import UserError
from aullm_dist.model.losses import AsymmetricLoss
from aullm_dist.training.batches import collate, sample_of_clip
from aullm_dist.training.build import build_model, evaluation_recipe, training_recipe
from aullm_dist.training.optimizer import build_optimizer

AUS = (1, 2, 4, 12)


class Own(nn.Module):
    """A network as a user may bring it."""

    def __init__(self, num_aus, num_frames, image_size):
        super().__init__()
        self.head = nn.Linear(num_frames * image_size**2, num_aus)

    def forward(self, views):
        return self.head(views.flatten(1))


class Wide(Own):
    def __init__(self, num_aus, num_frames, image_size):
        super().__init__(num_aus + 1, num_frames, image_size)


class Colour(Own):
    def __init__(self, num_aus, num_frames, image_size):
        super().__init__(num_aus, 3 * num_frames, image_size)


class Flow(Own):
    """Two channels for each frame but the first."""

    stream = "flow"

    def __init__(self, num_aus, num_frames, image_size):
        super().__init__(num_aus, 2 * (num_frames - 1), image_size)


class Other(nn.Module):
    def __init__(self, classes):
        super().__init__()


class Frozen(nn.Module):
    def __init__(self, num_aus, num_frames, image_size):
        super().__init__()

    def forward(self, views):
        return views


class Deaf(Own):
    stream = "sound"


def configured(network, *overrides):
    return load(None, ["model.llm=none", f"model.network={network}", *overrides])


def a_clip(seed=0, apex=13):
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 200, (8, 64, 64), dtype=np.uint8)
    return Clip("s/1", frames, np.arange(10, 18), apex)


@pytest.mark.parametrize("network", [*NETWORKS, f"{__name__}:Own", f"{__name__}:Flow"])
def test_one_step_through_the_trainer_s_parts(network):
    """Recipe, batch, forward, loss and optimizer, as the trainer puts them together; every parameter learns."""
    config = configured(network)
    built = build_model(config, AUS, "none")
    recipe, label = training_recipe(config, built), np.array([1, 0, 0, 1], dtype=np.float32)
    clips = [sample_of_clip(a_clip(seed), label, recipe, epoch=0) for seed in range(2)]
    batch = collate(clips)
    assert tuple(batch.views.shape[1:]) == view_shape(built.model.stream, 6, 64)
    optimizer = build_optimizer(built.model, config.training)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    output = built.model.train()(batch.views, batch.view_index, batch.edge_mask, batch.branches)
    assert output.logits.shape == (2, len(AUS))
    assert output.evidence_logits is output.graph_logits is None
    AsymmetricLoss(0.0, 0.0, 0.0)(output.logits, batch.labels).sum().backward()
    optimizer.step()
    still = [name for name, p in built.model.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    explained = built.model.eval().explain(batch.views)
    assert explained.logits.shape == (2, len(AUS))
    assert len(explained.high) == 2


@pytest.mark.parametrize(
    ("network", "rates"), [("evidence", [0.37] * 3), ("led_cnn", [0.37] * 2), ("sssnet_of", [0.5])]
)
def test_dropout_is_the_setting_s_or_the_paper_s(network, rates):
    model = build_model(configured(network, "model.dropout=0.37"), AUS, "none").model
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == rates


@pytest.mark.parametrize("network", ["led_sssnet", "sssnet_of"])
def test_layers_are_in_the_order_of_the_paper(network):
    network = build_model(configured(network), AUS, "none").model.network
    dimension = "3d" if network.stream == "led" else "2d"
    block = [f"Conv{dimension}", "ReLU", f"MaxPool{dimension}", f"BatchNorm{dimension}", f"Dropout{dimension}"]
    assert [type(layer).__name__ for layer in network.blocks] == 2 * block
    assert [type(layer).__name__ for layer in network.head] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert {layer.p for layer in (*network.blocks, *network.head) if "Dropout" in type(layer).__name__} == {0.5}
    convolutions = [tuple(layer.weight.shape) for layer in network.blocks if "Conv" in type(layer).__name__]
    pools = [layer.kernel_size for layer in network.blocks if "Pool" in type(layer).__name__]
    if dimension == "3d":
        assert (convolutions, pools) == ([(32, 1, 1, 5, 5), (64, 32, 2, 3, 3)], [(1, 3, 3), 2])
    else:
        assert (convolutions, pools) == ([(32, 3, 5, 5), (64, 32, 3, 3)], [3, 2])


def test_sizes_are_those_of_the_papers():
    count = {
        name: sum(p.numel() for p in build_model(configured(name), AUS, "none").model.parameters())
        for name in ("led_sssnet", "sssnet_of")
    }
    assert round(count["led_sssnet"] / 1e6, 2) == 2.69
    assert round(count["sssnet_of"] / 1e6, 2) == 1.35


def test_the_image_of_onset_and_apex():
    clip = a_clip()
    pair = frames_for(clip, 6, "onset_apex")
    np.testing.assert_array_equal(pair * 255, clip.frames[[0, 3]])
    image = onset_apex_image(pair)
    u, v = clip_flow(pair, RAW_FLOW)[0]
    maps = (u, v, strain_of(u, v))
    for channel, flow in zip(image, maps, strict=True):
        assert (channel.min(), channel.max()) == (0, 1)
        np.testing.assert_allclose(channel, (flow - flow.min()) / (flow.max() - flow.min()), rtol=1e-5, atol=1e-6)
    assert view_of(pair, "onset_apex").shape == (3, 64, 64)
    assert not onset_apex_image(np.stack([pair[0], pair[0]])).any()
    assert onset_apex_image(np.repeat(np.repeat(pair, 2, 1), 2, 2)).shape == (3, 64, 64)


def test_without_an_apex_it_is_the_frame_of_the_largest_change():
    frames = np.full((6, 64, 64), 100, dtype=np.uint8)
    frames[4, 20:40, 20:40] = 200
    pair = frames_for(Clip("s/1", frames, np.arange(6), None), 6, "onset_apex")
    np.testing.assert_array_equal(pair * 255, frames[[0, 4]])


def test_a_recipe_asks_for_what_the_network_takes():
    for network, stream in (
        ("led_cnn", "led"),
        ("led_sssnet", "led"),
        ("sssnet_of", "onset_apex"),
        ("evidence", "flow"),
    ):
        config = configured(network, "model.visual=flow")
        assert evaluation_recipe(config, build_model(config, AUS, "none")).visual == stream


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Wide", r"Wide answers views \[2, 6, 64, 64\] with \[2, 5\]; allowed: floating-point logits \[2, 4\]"),
        ("Colour", r"Colour does not take views \[V, 6, 64, 64\] \(mat1 and mat2"),
        ("Other", r"Other cannot be made of num_aus, num_frames and image_size"),
        ("Frozen", "Frozen has no parameter to train"),
        ("Deaf", "Deaf.stream is 'sound'; allowed: led, flow, both, onset_apex"),
        ("Owm", "has no torch.nn.Module Owm; did you mean Own"),
        ("load", "has no torch.nn.Module load"),
    ],
)
def test_a_network_of_other_shapes_is_refused_by_name(name, says):
    with pytest.raises(UserError, match=says) as refused:
        build_model(configured(f"{__name__}:{name}"), AUS, "none")
    assert "\n" not in str(refused.value)


def test_what_cannot_be_imported_is_refused():
    with pytest.raises(UserError, match="nowhere_to_be_found cannot be imported .* put its folder on PYTHONPATH"):
        build_model(configured("nowhere_to_be_found:Own"), AUS, "none")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.llm=none", "model.network=led_cmm"], "model.network is 'led_cmm'; allowed: led_cnn, led_sssnet"),
        (["model.llm=none", "model.network=o-s:C"], "model.network is 'o-s:C'"),
        (["model.network=evidence"], "model.network is 'evidence' with model.llm: tiny"),
        (["training.baseline=[evidence, evidence]"], "each network once"),
        (["training.baseline=[evidence, x]"], "training.baseline is 'x'"),
    ],
)
def test_names_are_checked_with_the_run_file(overrides, says):
    with pytest.raises(UserError, match=says):
        load(None, overrides)


def test_baselines_of_a_run(tmp_path):
    assert load(None, ["training.baseline=true"]).training.baselines() == ("led_cnn",)
    assert load(None, ["training.baseline=false"]).training.baselines() == ()
    settings = [
        "training.baseline=[sssnet_of, evidence, my.code:Net]", "counterfactual.enabled=true", "data.train=[somewhere]",
        "model.readout=per_au", "model.structure=false", "counterfactual.branches=1",
    ]  # fmt: skip
    config = load(None, settings)
    one, two, own = (baseline_config(config, tmp_path, name) for name in config.training.baselines())
    assert (one.model.llm, one.model.network, one.counterfactual.enabled) == ("none", "sssnet_of", False)
    assert (two.model.network, two.counterfactual.enabled) == ("evidence", True)
    assert own.training.output == str(tmp_path / "baselines" / "Net")
    assert one.training.baselines() == ()
    assert config.model.llm == "tiny"
