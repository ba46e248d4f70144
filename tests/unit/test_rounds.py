"""Passes that teams make in step: who waits for whom, what an empty pass leaves behind, and how all stop."""

import pytest
import torch

from aullm_dist.config import load
from aullm_dist.distributed import rounds as rounds_module
from aullm_dist.distributed.rounds import AgreementOfRounds, Kind, Rounds
from aullm_dist.errors import UserError
from aullm_dist.runtime.preemption import Preempted
from aullm_dist.runtime.signals import StopSignals
from aullm_dist.training.build import build_model

ANSWER, TRAIN, NOTHING = Kind.ANSWER, Kind.TRAIN, Kind.NOTHING


class Base:
    """Stands for what gathers the LLM."""

    def __init__(self):
        self.ended = self.partitioned = 0

    def pass_ended(self):
        self.ended += 1

    def partition(self):
        self.partitioned += 1

    def begins_with(self, user):
        return user.register_forward_pre_hook(lambda *_: None)


@pytest.fixture(scope="module")
def model(tiny_llm):
    overrides = ["model.lora_rank=4", "model.graph_width=16", "model.graph_heads=2", "model.lora_dropout=0.5"]
    config = load(None, [f"model.llm={tiny_llm}", "model.activation_checkpointing=reentrant", *overrides])
    return build_model(config, (1, 4), tiny_llm).model


@pytest.fixture
def rounds(monkeypatch, model):
    """Return rounds whose other team wants, pass after pass, what `others` says: a kind, and whether to stop."""
    others: list[tuple[Kind, bool]] = []

    def all_reduce(values, op, group):
        kind, stops = others.pop(0)
        values[0], values[1] = max(int(values[0]), kind), max(int(values[1]), stops)

    monkeypatch.setattr(rounds_module.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(rounds_module.dist, "destroy_process_group", lambda _: None)
    monkeypatch.setattr(rounds_module.dist, "all_reduce", all_reduce)
    made = Rounds(lambda: False, Base())
    made.attach(model)
    made.others = others
    yield made
    made.close()


def ask(model):
    """Run a pass of one branch and return its logits."""
    soft = torch.zeros(1, model.reasoner.au_head.in_features)
    return model.reasoner(soft, soft, torch.zeros(1, 2, dtype=torch.int64))


def test_training_is_never_kept_waiting(rounds, model):
    rounds.others += [(ANSWER, False), (NOTHING, False), (TRAIN, False)]
    for _ in range(3):
        ask(model)
    assert (rounds.passes, rounds.empty) == (3, 0)


def test_an_evaluation_waits_for_those_that_train(rounds, model):
    rounds.others += [(TRAIN, False), (TRAIN, False), (NOTHING, False)]
    with torch.no_grad():
        ask(model)
    assert (rounds.passes, rounds.empty) == (3, 2)
    assert rounds._base.ended == 3


@pytest.mark.parametrize("kind", [ANSWER, TRAIN])
def test_who_has_nothing_left_passes_along_until_nobody_wants_more(rounds, kind):
    rounds.others += [(kind, False), (kind, False), (NOTHING, False)]
    rounds.finish()
    assert (rounds.passes, rounds.empty) == (2, 2)
    assert rounds._base.partitioned == 1


def test_an_empty_pass_leaves_nothing_behind(rounds, model):
    """Made within an evaluation: without gradients, in evaluation mode."""
    rounds.others += [(TRAIN, False), (NOTHING, False)]
    model.eval()
    with torch.no_grad():
        waited = ask(model)
        rounds.others += [(NOTHING, False)]
        assert torch.equal(waited, ask(model))
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_stop_behind_the_same_pass(rounds, model):
    signals = StopSignals()
    agreement = AgreementOfRounds(rounds, signals)
    rounds.others += [(TRAIN, False), (TRAIN, True)]
    agreement.tick()
    ask(model)
    agreement.tick()
    ask(model)
    with pytest.raises(Preempted):
        agreement.tick()
    # Nor does who waits for an evaluation, or has nothing left, come to another pass.
    with torch.no_grad(), pytest.raises(Preempted):
        ask(model)
    with pytest.raises(Preempted):
        rounds.finish()
    assert rounds.others == []


def test_who_is_told_to_stop_while_waiting_does(rounds, model):
    rounds.others += [(TRAIN, True)]
    with torch.no_grad(), pytest.raises(Preempted):
        ask(model)
    assert (rounds.passes, rounds.empty) == (1, 1)


def test_an_error_of_another_process_is_raised_here(rounds, model, monkeypatch):
    def all_reduce(values, op, group):
        values[2] = 1

    def all_gather_object(errors, error, group):
        errors[:] = [error, UserError("a clip cannot be read")]

    monkeypatch.setattr(rounds_module.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(rounds_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(rounds_module.dist, "all_gather_object", all_gather_object)
    with pytest.raises(UserError, match="process 1: a clip cannot be read") as caught:
        ask(model)
    assert caught.value.told_to_all
    assert rounds.has_failed
