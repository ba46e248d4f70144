"""Plans of folds side by side: what teams hold and send, and which number of them is best."""

import functools
import json

import pytest

from aullm_dist.cli import main
from aullm_dist.config import load
from aullm_dist.errors import UserError
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import plan
from aullm_dist.planning.side_by_side import best, compare, table_of

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
BATCH = 8


def configured(strategy, at_once=1, micro_batch=1, quantization="nf4"):
    return load(
        None,
        [
            "model.llm=none/here", f"model.architecture={json.dumps(LLAMA)}", f"model.quantization={quantization}",
            "model.structure=false", "model.lora_targets=[q_proj]", "data.train=[casme2]",
            f"training.strategy={strategy}", f"training.folds_at_once={at_once}", "training.epochs=2",
            f"training.global_batch={BATCH}", f"training.micro_batch={micro_batch}", "training.processes=4",
        ],
    )  # fmt: skip


make = functools.partial(plan, prefix_tokens=20, suffix_tokens=6)


def planned(**given):
    return make(configured(**given), Cluster(gpus=4))


def terms(found):
    return {term.name: term.nbytes for phase in found.phases if phase.name == "step" for term in phase.terms}


def test_teams_hold_a_share_of_the_base_and_all_that_is_trained():
    engine = terms(planned(strategy="zero3"))
    teams, alone = (terms(planned(strategy="zero3", at_once=4)), terms(planned(strategy="ddp", at_once=4)))
    assert teams["frozen LLM / N"] == engine["frozen LLM / N"]
    for name in ("trained parameters: T", "AdamW's moments: 2T"):
        assert teams[name] == alone[name]
    assert "gradient buckets: T" not in teams


def test_teams_send_no_gradients_to_each_other():
    assert "all_reduce" not in planned(strategy="zero3", at_once=4).network.messages
    assert planned(strategy="ddp", at_once=4).network.messages == {}
    two = planned(strategy="ddp", at_once=2).network
    # Averaged in a team of two, and not over all four: half of each buffer, there and back.
    assert two.received == two.messages["all_reduce"]
    assert planned(strategy="zero3", at_once=2).network.messages.keys() == {"all_reduce", "all_gather_into_tensor"}


def test_more_teams_with_larger_micro_batches_gather_less_for_each_fold():
    choices = compare(configured("zero3"), Cluster(gpus=4, link=1e6), make, folds=8, clips=16)
    assert [(c.folds_at_once, c.plan.config.training.micro_batch) for c in choices] == [(1, 2), (2, 4), (4, 8)]
    gathered = [choice.gathered for choice in choices]
    assert gathered[0] > 1.5 * gathered[1] > 2.2 * gathered[2] > 0
    # Over a slow network the time of all folds is that of gathering; 8 folds of 4 steps in rounds of 4.
    assert best(choices).folds_at_once == 4
    assert choices[2].protocol_seconds == pytest.approx(2 * 4 * choices[2].step_seconds)
    assert table_of(choices, 8, known=True).row_count == 3


def test_what_does_not_fit_gets_a_smaller_micro_batch_or_is_left_out():
    roomy = compare(configured("ddp"), Cluster(gpus=4, gpu_memory=2**40, reserve=0), make, folds=4)
    limit = roomy[0].plan.gpu_bytes
    tight = compare(configured("ddp"), Cluster(gpus=4, gpu_memory=limit, reserve=0), make, folds=4)
    assert [choice.plan.config.training.micro_batch for choice in roomy] == [2, 4, 8]
    for choice in tight:
        assert choice.plan.gpu_bytes <= limit
        assert choice.plan.config.training.micro_batch < 8
    assert compare(configured("ddp"), Cluster(gpus=4, gpu_memory=2**10, reserve=0), make, folds=4) == []
    assert best([]) is None


def test_no_more_teams_than_folds_are_compared():
    choices = compare(configured("ddp"), Cluster(gpus=4), make, folds=3)
    assert [choice.folds_at_once for choice in choices] == [1, 2]


def test_strategies_that_divide_more_are_refused():
    with pytest.raises(UserError, match="strategy: zero2, which shards what is trained"):
        planned(strategy="zero2", at_once=2)


def test_clips_without_folds_are_refused(capsys):
    assert main(["plan", "casme2_loso", "--fold-clips", "9"]) == 2
    assert "--fold-clips is given without --folds" in capsys.readouterr().err
