"""Batches: index tables, keyed draws, and gradients that do not depend on how a global batch is cut."""

import shutil

import numpy as np
import pytest
import torch

from aullm_dist.config import load
from aullm_dist.data.clips import ClipStore, sample_frames
from aullm_dist.data.views import view_of
from aullm_dist.errors import UserError
from aullm_dist.model.aullm import ModelOutput
from aullm_dist.model.counterfactual import INTERVENTIONS, Chances
from aullm_dist.release.predicting import views_of
from aullm_dist.training.batches import ClipRecipe, collate, evaluation_batches, make_sample, sample_of_clip
from aullm_dist.training.build import build_model, training_recipe
from aullm_dist.training.objective import Objective

AUS = (1, 2, 4, 7, 12)
PRIOR = np.array([True, True, True, False])


def _edit(rng: np.random.Generator) -> np.ndarray:
    mask = PRIOR.copy()
    mask[rng.integers(3)] = False
    return mask


def _recipe(**changes: object) -> ClipRecipe:
    settings = {
        "num_frames": 6,
        "cut_fraction": 0.2,
        "augment": True,
        "chances": Chances(3, {"structure": 1.0, "appearance": 1.0, "neutral": 1.0}),
        "prior_mask": PRIOR,
        "edit_structure": _edit,
        "contradiction": True,
        "seed": 0,
    }
    return ClipRecipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def view(small_dataset):
    store = ClipStore([small_dataset], 32)
    return store.view([sample.sample_id for sample in store.samples])


def test_branches_point_at_the_views_and_structures_of_their_own_clip(view):
    labels = view.labels(AUS)
    batch = collate([make_sample(view, i, labels[i], _recipe(), epoch=0) for i in range(3)])
    assert batch.views.shape == (9, 6, 32, 32)
    assert batch.edge_mask.shape == (12, 4)
    assert {kind: len(rows) for kind, (rows, _) in batch.rows.items()} == {
        "factual": 3, "structure": 3, "appearance": 3, "neutral": 3, "evidence_only": 3, "structure_only": 3,
    }  # fmt: skip
    for rows, clips in batch.rows.values():
        assert (batch.branches[rows, 0] // 3 == clips).all()
        assert (batch.branches[rows, 1] // 4 == clips).all()
    factual, _ = batch.rows["factual"]
    structure, _ = batch.rows["structure"]
    # The structure intervention leaves the evidence alone and edits only its own mask.
    assert (batch.branches[structure, 0] == batch.branches[factual, 0]).all()
    assert batch.edge_mask[batch.branches[factual, 1]].sum() == 9
    assert batch.edge_mask[batch.branches[structure, 1]].sum() == 6


def test_crossed_pairs_exchange_the_tokens_of_clip_and_neutral_twin(view):
    labels = view.labels(AUS)
    batch = collate([make_sample(view, i, labels[i], _recipe(), epoch=0) for i in range(2)])
    pair = {kind: batch.branches[batch.rows[kind][0]] for kind in batch.rows}
    torch.testing.assert_close(pair["evidence_only"][:, 0], pair["factual"][:, 0])
    torch.testing.assert_close(pair["evidence_only"][:, 1], pair["neutral"][:, 1])
    torch.testing.assert_close(pair["structure_only"][:, 0], pair["neutral"][:, 0])
    torch.testing.assert_close(pair["structure_only"][:, 1], pair["factual"][:, 1])


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_every_intervention_has_a_twin_and_a_loss_of_its_own(view, kind):
    """A kind that was added to the list alone would train nothing, and nobody would see it."""
    labels = view.labels(AUS)
    recipe = _recipe(chances=Chances(1, {kind: 1.0}), contradiction=False)
    batch = collate([make_sample(view, index, labels[index], recipe, epoch=0) for index in range(2)])
    assert set(batch.rows) == {"factual", kind}
    output = ModelOutput(torch.randn(len(batch.branches), len(AUS), generator=torch.Generator().manual_seed(0)))
    config = load(None, ["counterfactual.enabled=true"])
    _, terms = Objective.from_config(config)(output, batch)
    assert terms[kind][0] > 0
    assert set(terms) == {"loss", "asl", kind}


def test_draws_are_keyed_by_seed_epoch_and_sample(view):
    labels = view.labels(AUS)

    def views(epoch: int, seed: int = 0) -> np.ndarray:
        return np.stack(make_sample(view, 1, labels[1], _recipe(seed=seed), epoch).views)

    np.random.seed(1)
    first = views(0)
    np.random.seed(2)
    np.testing.assert_array_equal(first, views(0))
    assert np.abs(first - views(1)).max() > 0
    assert np.abs(first - views(0, seed=1)).max() > 0


def test_flow_is_that_of_the_changed_frames(view):
    """Every draw is the same; an intervention is seen through flow."""
    labels = view.labels(AUS)
    gray, flow = (make_sample(view, 1, labels[1], _recipe(visual=visual), epoch=0) for visual in ("led", "flow"))
    assert gray.kinds == flow.kinds
    assert len(gray.views) == len(flow.views) == 3
    for frames, maps in zip(gray.views, flow.views, strict=True):
        np.testing.assert_array_equal(maps, view_of(frames, "flow"))
    assert np.abs(flow.views[1] - flow.views[0]).max() > 0.01
    batch = collate([flow])
    assert batch.views.shape == (3, 10, 32, 32)


def test_the_neutral_twin_moves_less_than_its_clip(tiny_dataset):
    """In 64 pixels: movements of 32 are too small against the noise."""
    store = ClipStore([tiny_dataset], 64)
    view = store.view([sample.sample_id for sample in store.samples])
    labels = view.labels(AUS)
    recipe = _recipe(augment=False, cut_fraction=0.0, chances=Chances(1, {"neutral": 1.0}), visual="flow")
    sizes = [
        [np.hypot(maps[0::2], maps[1::2]).mean() for maps in make_sample(view, i, labels[i], recipe, 0).views]
        for i in range(len(view))
    ]
    clip, twin = np.mean(sizes, axis=0)
    assert 0 < twin < clip


@pytest.mark.parametrize("visual", ["flow", "led", "onset_apex"])
def test_a_share_of_training_clips_is_seen_without_movement_and_without_aus(view, visual):
    """Others in each epoch, each with its own labels when it is not among them, and equal to a run without them."""
    labels = view.labels(AUS)
    share, none = (_recipe(chances=Chances(0, {}), visual=visual, neutral_share=value) for value in (0.4, 0.0))
    neutral, sizes = [], []
    for epoch in range(30):
        for index in range(len(view)):
            sample, plain = (make_sample(view, index, labels[index], recipe, epoch) for recipe in (share, none))
            assert sample.sample_id == plain.sample_id
            np.testing.assert_array_equal(plain.label, labels[index])
            same = np.array_equal(sample.views[0], plain.views[0])
            if same:
                np.testing.assert_array_equal(sample.label, labels[index])
            else:
                assert not sample.label.any()
                sizes.append([np.abs(sample.views[0]).mean(), np.abs(plain.views[0]).mean()])
            neutral.append((epoch, index) if not same else None)
    if visual == "flow":
        without, whole = np.mean(sizes, axis=0)
        assert 0 < without < whole
    drawn = [one for one in neutral if one]
    assert 0.25 < len(drawn) / len(neutral) < 0.55
    assert len({index for _, index in drawn}) == len(view), "every clip is drawn in some epoch"
    everything = [make_sample(view, i, labels[i], _recipe(neutral_share=0.9), 0) for i in range(len(view))]
    assert any("neutral" in one.kinds for one in everything), "interventions are drawn of such clips too"


def test_training_and_prediction_make_the_same_view(view):
    clip, label = view.clip(0), view.labels(AUS)[0]
    for visual in ("led", "flow", "both"):
        sample = sample_of_clip(clip, label, ClipRecipe(num_frames=6, visual=visual), epoch=0)
        predicted = views_of(sample_frames(clip, 6)[None], visual)
        np.testing.assert_array_equal(predicted[0].numpy(), sample.views[0])


def test_evaluation_takes_every_clip_once_over_all_processes_without_draws(view):
    labels = view.labels(AUS)
    recipe = ClipRecipe(num_frames=6, prior_mask=PRIOR)
    seen, passes = [], []
    # More processes than divide the clips, so that one runs out before the others.
    processes = len(view) - 1
    for rank in range(processes):
        batches = list(evaluation_batches(view, labels, recipe, micro_batch=1, processes=processes, rank=rank))
        for batch, counted in batches:
            assert set(batch.rows) == {"factual"}
            seen += batch.sample_ids[:counted]
        passes.append(len(batches))
    assert sorted(seen) == sorted(sample.sample_id for sample in view.samples)
    assert set(passes) == {2}, "an engine that gathers in every forward pass needs as many of them on each process"


def test_without_a_graph_there_is_no_edge_mask(view):
    labels = view.labels(AUS)
    recipe = _recipe(prior_mask=None, contradiction=False, chances=Chances(2, {"appearance": 1.0, "neutral": 1.0}))
    batch = collate([make_sample(view, i, labels[i], recipe, epoch=0) for i in range(2)])
    assert batch.edge_mask is None
    assert set(batch.rows) == {"factual", "appearance", "neutral"}


@pytest.mark.parametrize("llm", ["aullm", "none"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(view, tiny_llm, llm):
    config = load(None, [f"model.llm={'none' if llm == 'none' else tiny_llm}", "model.dropout=0.0", "data.size=32"])
    config = config.changed({"counterfactual.enabled": True, "counterfactual.branches": 2})
    built = build_model(config, AUS, tiny_llm)
    recipe, objective = training_recipe(config, built), Objective.from_config(config)
    labels = view.labels(AUS)
    samples = [make_sample(view, i, labels[i], recipe, epoch=0) for i in range(8)]

    def gradients(size: int) -> dict[str, torch.Tensor]:
        built.model.zero_grad()
        for start in range(0, 8, size):
            batch = collate(samples[start : start + size])
            output = built.model(batch.views, batch.view_index, batch.edge_mask, batch.branches)
            loss, _ = objective(output, batch)
            (loss * size / 8).backward()
        return {name: p.grad.clone() for name, p in built.model.named_parameters() if p.requires_grad}

    if llm == "aullm":
        # Heads that start at zero hand no gradient on.
        for parameter in (*built.model.reasoner.au_head.parameters(), built.model.graph.answer.weight):
            parameter.data.normal_(std=0.02)
    whole, parts = gradients(8), gradients(2)
    # The LoRA product is zero at first, so the A matrices have no gradient yet; everything else must have one.
    silent = {name for name, gradient in whole.items() if not gradient.abs().sum() > 0}
    assert all("lora_A" in name for name in silent), silent
    for name, gradient in whole.items():
        # Products of other sizes add up in another order; what matters is felt at the size of the whole gradient.
        atol = max(1e-6, 1e-4 * float(gradient.abs().max()))
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=atol, msg=lambda text, name=name: name + text)


def test_a_missing_dataset_another_size_and_a_repeated_one_are_refused(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="no prepared dataset"):
        ClipStore([tmp_path], 64)
    with pytest.raises(UserError, match="64x64 pixels, data.size is 96"):
        ClipStore([tiny_dataset], 96)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_dataset, damaged)
    next(damaged.glob("data-*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(UserError, match="damaged") as caught:
        ClipStore([damaged], 64)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="occurs twice"):
        ClipStore([tiny_dataset, tiny_dataset], 64)
