"""Plans against what they describe: the built model, real passes, a real optimizer and checkpoint, hand-made cases."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_backbones import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from aullm_dist.checkpoint.store import RunFacts, save_checkpoint
from aullm_dist.cli import main
from aullm_dist.config import load, load_strategy
from aullm_dist.errors import UserError
from aullm_dist.llm.architecture import check_architecture, config_of
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.tiny import ARCHITECTURES, build_tiny_backbone, tiny_parts
from aullm_dist.model.counterfactual import Chances, Counts, branching, counts_of, draw_interventions, mean_and_largest
from aullm_dist.planning import trace as tracing
from aullm_dist.planning.advice import advise
from aullm_dist.planning.cluster import Cluster, parse_size
from aullm_dist.planning.engines import Engine
from aullm_dist.planning.planner import NotPlanned, plan
from aullm_dist.planning.prompts import plan_prompt
from aullm_dist.planning.report import as_dict, shortfall
from aullm_dist.planning.saving import checkpoint_bytes
from aullm_dist.planning.skeleton import batch_of, build, weights_of
from aullm_dist.planning.trace import trace
from aullm_dist.training.build import build_model
from aullm_dist.training.optimizer import build_optimizer

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
COUNTS = Counts(2, 6, 8, 12)
# Passes without values take as long as they have operations.
FEW = ["model.structure=false", "model.readout=last", "model.lora_targets=[q_proj]"]
SMALL = ["model.llm_layers=2", "model.llm_hidden=32", "training.micro_batch=4", *FEW]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Return a function that gives the folder of a tiny backbone of an architecture."""
    folder = tmp_path_factory.mktemp("backbones")
    return lambda name, layers=3: build_tiny_backbone(folder / f"{name}-{layers}", architecture=name, layers=layers)


def _config(folder, *overrides):
    return load(None, [f"model.llm={folder}", "model.dropout=0", "model.lora_rank=4", *overrides])


def _skeleton(config, in_pieces=False):
    prompt = plan_prompt(config).prompt
    return weights_of(build(config, config_of(config.model), prompt, in_pieces), config)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_those_of_the_built_model(backbones, architecture, quantization):
    config = _config(backbones(architecture), f"model.quantization={quantization}", "training.precision=bf16")
    prompt = plan_prompt(config).prompt
    real = build_model(config, prompt.aus, config.model.llm).model
    expected = {name: (getattr(module, key), module) for name, key, module in owners(real)}
    planned = {weight.name: weight for weight in _skeleton(config)}
    assert planned.keys() == expected.keys()
    for name, weight in planned.items():
        parameter, module = expected[name]
        assert (weight.numel, weight.itemsize) == (parameter.numel(), parameter.itemsize), name
        assert weight.trainable == parameter.requires_grad, name
        state = getattr(module, "quant_state", None) if name.endswith("weight") else None
        constants = state.absmax.nbytes + state.state2.absmax.nbytes if state is not None else 0
        assert weight.constants == constants, name
    # Tiny models have few enough linear layers to count: seven in each of three.
    assert sum(weight.constants > 0 for weight in planned.values()) == (21 if quantization == "nf4" else 0)


def test_several_processes_load_no_vocabulary_head(backbones):
    config = _config(backbones("llama"))
    alone, several = _skeleton(config), _skeleton(config, in_pieces=True)
    assert {w.name for w in alone} - {w.name for w in several} == {"reasoner.llm.base_model.model.lm_head.weight"}


def test_layers_that_stand_for_others_give_what_all_layers_give(monkeypatch):
    """With layers of two kinds, recomputed."""
    config = load(
        None,
        [
            "model.llm_architecture=gemma2", "model.llm_layers=5", "training.precision=bf16",
            "model.activation_checkpointing=non_reentrant", "model.lora_targets=[q_proj]", "model.structure=false",
        ],
    )  # fmt: skip
    llm, prompt = config_of(config.model), plan_prompt(config).prompt
    short = trace(config, llm, prompt, COUNTS, training=True)
    kinds = list(llm.layer_types)
    monkeypatch.setattr(tracing, "_chosen_layers", lambda _: (list(range(5)), kinds))
    long = trace(config, llm, prompt, COUNTS, training=True)
    assert short.records == long.records
    assert short.peak > short.saved > 0


def test_passes_without_values_allocate_what_real_ones_do(backbones):
    config = _config(backbones("llama"))
    prompt = plan_prompt(config).prompt
    planned = trace(config, config_of(config.model), prompt, COUNTS, training=True, keep_gradients=True)
    real = build_model(config, prompt.aus, config.model.llm).model
    kept, seen = 0, {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}

    def keep(tensor):
        nonlocal kept
        storage = tensor.untyped_storage()
        kept += 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
        return tensor

    arguments = batch_of(config, real.graph.num_edges, *(int(n) for n in (6, 8, 12)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = real(*arguments)
    # Saved for the backward pass, plus the inputs and outputs that the caller holds.
    assert planned.saved == pytest.approx(kept, rel=0.03)
    sum(part.sum() for part in output).backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    assert sum(record.change for record in planned.records) == pytest.approx(gradients, rel=0.02)


@pytest.mark.parametrize("divided", [False, True])
def test_gradients_that_nobody_takes_stay_until_the_end(backbones, divided):
    """Of an LLM that teams share too: it is divided, but no engine takes the gradients of its LoRA."""
    config = _config(backbones("llama"), *FEW, "model.lora_rank=64")
    prompt = plan_prompt(config).prompt
    planned = trace(
        config, config_of(config.model), prompt, COUNTS, training=True, keep_gradients=True, divided=divided
    )
    trained = sum(w.nbytes for w in _skeleton(config) if w.trainable)
    assert sum(record.change for record in planned.records) == pytest.approx(trained, rel=0.002)


def test_operations_are_those_of_the_products(backbones):
    config = _config(backbones("llama"))
    prompt, llm = plan_prompt(config).prompt, config_of(config.model)
    # The same clips with more branches: what is added runs through the LLM alone.
    few, many = (trace(config, llm, prompt, dataclasses.replace(COUNTS, branches=n), training=True) for n in (4, 24))
    tokens = 20 * prompt.suffix_tokens
    weights = _skeleton(config)
    frozen = sum(w.weights for w in weights if "layers" in w.name and w.name.endswith("base_layer.weight"))
    lora = sum(w.weights for w in weights if "lora_" in w.name)
    floor = 4 * frozen * tokens + 6 * lora * tokens
    assert floor < many.flops - few.flops < 1.3 * floor


def test_optimizer_and_checkpoint_are_as_large_as_planned(backbones, tmp_path):
    config = _config(backbones("llama"))
    prompt = plan_prompt(config).prompt
    built = build_model(config, prompt.aus, config.model.llm)
    optimizer = build_optimizer(built.model, config.training)
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = _skeleton(config)
    terms = {term.name: term.nbytes for term in Engine.of(None, 1, 1, cpu=True).trained(weights)}
    moments = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert terms["AdamW's moments: 2T"] == moments
    assert terms["trained parameters: T"] == moments // 2
    folder = save_checkpoint(
        tmp_path,
        1,
        model=built.model,
        optimizer=optimizer,
        state={},
        run=RunFacts(config={}, model_config=built.model_config),
    )
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # Headers, counters and the few buffers are all there is besides.
    assert checkpoint_bytes(weights) < written < checkpoint_bytes(weights) + 2**17


def test_branches_are_counted_as_they_are_drawn():
    chances = Chances(2, {"structure": 1.0, "appearance": 0.5, "neutral": 0.25})
    rng = np.random.default_rng(0)
    drawn = [counts_of(draw_interventions(chances, rng), crossed=True) for _ in range(4000)]
    mean, most = mean_and_largest(chances, crossed=True)
    for name in ("views", "structures", "branches"):
        values = [getattr(counts, name) for counts in drawn]
        assert getattr(mean, name) == pytest.approx(np.mean(values), abs=0.06)
        assert getattr(most, name) == max(values)
    assert counts_of(("structure", "appearance", "neutral"), crossed=True) == Counts(1, 3, 4, 6)
    assert mean.times(4).branches >= 4 * mean.branches


def test_no_crossed_pairs_without_a_graph():
    config = load(None, ["counterfactual.enabled=true", "counterfactual.branches=2"])
    assert branching(config, has_graph=True)[1]
    assert not branching(config, has_graph=False)[1]
    assert "structure" not in branching(config, has_graph=False)[0].names


def test_shares_add_up_and_smaller_ones_need_less(backbones):
    weights = _skeleton(_config(backbones("llama"), "training.precision=bf16"), in_pieces=True)
    whole = Engine.of(None, 2, 1, cpu=False)
    zero3 = {"zero_optimization": {"stage": 3}}
    divided = Engine.of(zero3, 3, 1, cpu=False)
    frozen = [w for w in weights if not w.trainable]
    assert whole.base(weights)[0].nbytes == sum(w.nbytes for w in frozen)
    assert 0 <= 3 * divided.base(weights)[0].nbytes - sum(w.nbytes for w in frozen) < 3 * 2 * len(frozen)
    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert Engine.of(offloaded, 3, 1, cpu=False).base(weights)[0].on_host


def _named(**changes):
    """Return a configuration of an LLM that is known by its architecture alone."""
    architecture = json.dumps({**LLAMA, **changes})
    return load(None, ["model.llm=some/where", f"model.architecture={architecture}", "training.micro_batch=4", *FEW])


def test_architecture_and_folder_give_the_same_plan(backbones):
    folder = backbones("llama")
    vocabulary = len(tiny_parts("llama", layers=3)[1])
    named = _named(vocab_size=vocabulary)
    config = _config(folder, "training.micro_batch=4", *FEW)
    named = named.changed({"model.lora_rank": 4, "model.dropout": 0.0})
    tokens = plan_prompt(config).prompt
    lengths = {"prefix_tokens": tokens.prefix_tokens, "suffix_tokens": tokens.suffix_tokens}
    cluster = Cluster(gpus=2, gpu_memory=2**34)
    found, other = plan(config, cluster, speed=False), plan(named, cluster, speed=False, **lengths)
    assert found.phases == other.phases
    assert found.network == other.network
    assert "counted by the LLM's tokenizer" in found.assumptions[0]


def test_terms_add_up_to_the_peaks_that_are_told():
    planned = plan(_named(), Cluster(gpus=4, nodes=2, gpu_memory=2**34), prefix_tokens=4000, suffix_tokens=60)
    told = as_dict("run", planned)
    assert 0 < told["activations"]["non_reentrant"] < told["activations"]["none"]
    for phase in told["phases"].values():
        assert phase["gpu_bytes"] + phase["machine_bytes"] == sum(term["bytes"] for term in phase["terms"])
    assert told["peak"]["bytes"] == max(phase["gpu_bytes"] for phase in told["phases"].values())
    assert told["fits"] is True
    assert told["shortfall"] is None
    json.dumps(told)


@pytest.mark.parametrize(
    ("quantization", "gpus", "on_host"), [("none", 1, True), ("nf4", 1, False), ("none", 2, False)]
)
def test_one_process_loads_what_is_not_packed_into_the_memory_of_the_machine(quantization, gpus, on_host):
    config = load(None, ["model.llm=tiny", f"model.quantization={quantization}", *SMALL])
    loading = plan(config, Cluster(gpus=gpus), speed=False).phases[0]
    assert (loading.total(False) == 0) == on_host
    assert (loading.total(True) > 0) == on_host


def test_a_gpu_holds_the_gradient_bucket_of_zero3_before_the_first_step():
    config = load(None, ["model.llm=tiny", "training.strategy=zero3", *SMALL])
    start = next(phase for phase in plan(config, Cluster(gpus=2), speed=False).phases if phase.name == "start")
    bucket = load_strategy("zero3").deepspeed["zero_optimization"]["reduce_bucket_size"]
    assert start.total(False) > 4 * bucket


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would():
    config = _named().changed({"training.micro_batch": 1, "training.global_batch": 1})
    needed = plan(config, Cluster(gpu_memory=1), speed=False).gpu_bytes
    cluster = Cluster(gpus=1, gpu_memory=needed - 2**18, reserve=0)
    planned = plan(config, cluster, speed=False)
    assert planned.fits is False
    assert planned.gpu_bytes - cluster.gpu_memory == 2**18
    assert "more than its" in shortfall(planned)
    advice = advise(config, cluster)
    assert [str(change) for change in advice.changes] == ["model.quantization=nf4"]
    assert advice.plan.fits


def test_advice_takes_single_changes_in_order_and_then_the_smallest_combination():
    """With a stand-in for the plan: what fits is known."""
    tried = []

    def fits_where(wanted):
        def make(config, cluster, speed):
            state = (config.model.quantization, config.model.activation_checkpointing, config.training.micro_batch)
            tried.append(state)
            return dataclasses.replace(template, cluster=Cluster(gpu_memory=2**60 if wanted(state) else 1))

        return make

    template = plan(_named(), Cluster(), speed=False)
    config = _named()
    both = advise(config, Cluster(gpu_memory=1), fits_where(lambda s: s[0] == "nf4" and s[2] <= 2))
    assert [str(change) for change in both.changes] == ["model.quantization=nf4", "training.micro_batch=2"]
    # First whether all changes together would do, then each by itself.
    assert tried[0] == ("nf4", "non_reentrant", 1)
    assert ("nf4", "none", 4) in tried
    assert config.model.quantization == "none"
    nothing = advise(copy.deepcopy(config), Cluster(gpu_memory=1), fits_where(lambda s: False))
    assert nothing.changes == ()


@pytest.mark.parametrize(
    ("architecture", "part"),
    [
        ({**{name: LLAMA[name] for name in SIZES}, "model_type": "bert"}, "model_type is 'bert', which is no decoder"),
        ({**{name: LLAMA[name] for name in SIZES}, "model_type": "t5"}, "model_type is 't5'"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "lacks vocab_size"),
        ({**LLAMA, "hiden_size": 3}, "hiden_size is no field"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_an_architecture_that_is_none_is_refused(architecture, part):
    config = load(None, ["model.llm=some/where", f"model.architecture={json.dumps(architecture)}"])
    with pytest.raises(UserError, match=part):
        config_of(config.model)


def test_a_config_on_disk_must_agree(backbones):
    folder = str(backbones("llama"))
    config = load(None, [f"model.llm={folder}", f"model.architecture={json.dumps({**LLAMA, 'num_hidden_layers': 5})}"])
    for check in (lambda: config_of(config.model), lambda: check_architecture(config.model, folder)):
        with pytest.raises(UserError, match=r"num_hidden_layers is 3 in its config.json, but model.architecture has 5"):
            check()


def test_without_architecture_or_files_there_is_no_plan():
    with pytest.raises(UserError, match=r"model.architecture is not given"):
        plan(load(None, ["model.llm=some/where"]), Cluster())


@pytest.mark.parametrize(
    ("overrides", "cluster", "part"),
    [
        ([], {"gpus": 3}, "global_batch is 16"),
        (["training.strategy=nothing"], {"gpus": 1}, "training.strategy is 'nothing'"),
        (["training.strategy=zero3_hpz"], {"gpus": 2, "nodes": 1}, None),
        (["model.lora_targets=[nope]"], {"gpus": 1}, "matches no linear layer"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(overrides, cluster, part):
    config = load(None, [*SMALL, *overrides])
    if part is None:
        assert plan(config, Cluster(**cluster), speed=False).network.messages["all_gather_into_tensor"] > 0
        return
    with pytest.raises(UserError, match=part):
        plan(config, Cluster(**cluster))


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5 kib", 1536), ("7", 7)])
def test_sizes_are_read(text, size):
    assert parse_size(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "-3GB", "0", "80 parsecs"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_size(text, "--gpu-memory")


def test_command_prints_tables_and_writes_json(capsys, tmp_path):
    path = tmp_path / "plan.json"
    arguments = ["plan", "demo", "--gpus", "2", "--gpu-memory", "8GiB", "--json", str(path), *SMALL]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "Memory peaks" in text
    assert "It fits" in text
    assert max(map(len, text.splitlines())) <= 100
    written = json.loads(path.read_text())
    assert written["fits"] is True
    assert set(written["phases"]) == {"load", "start", "step", "evaluation", "save"}


def test_command_ends_with_1_where_it_does_not_fit(capsys):
    assert main(["plan", "demo", "--gpu-memory", "1MiB", "--reserve", "1B", *SMALL]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "It does not fit" in text
    assert "None of the changes" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "no_such_run"], "no such run file"),
        (["plan", "demo", "--gpus", "3", "--nodes", "2"], "3 GPUs on 2 machines"),
        (["plan", "demo", "--gpu-memory", "much"], "--gpu-memory"),
        (["plan", "demo", "--json", "/no/such/folder/plan.json"], "its folder does not exist"),
        (["plan", "demo", "model.llm=none", "model.readout=last"], "nothing to plan"),
        (["plan", "demo", "model.architecture=3"], "a mapping"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, part):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out


def test_a_plan_for_cpus_speaks_of_cpus(capsys, tmp_path):
    """Neither GPUs nor an H100's arithmetic: nothing is known of the CPU's until it is given."""
    told = tmp_path / "plan.json"
    assert main(["plan", "demo", "--cpu", "--json", str(told), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "GPU" not in text.replace("--gpu-", "")
    assert "H100" not in text
    assert "0.00 TFLOP" not in text
    speed = json.loads(told.read_text())["speed"]
    assert speed["flops"] > 0
    assert speed["compute_seconds"] is speed["clips_per_second"] is None
    assert main(["plan", "demo", "--cpu", "--gpu-flops", "1e11", *SMALL]) == 0
    assert "0.1 TFLOP/s at the peak of a process" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 processes on 2 machines"):
        Cluster(gpus=3, nodes=2, cpu=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "lfm2"])
def test_any_type_that_packs_is_planned_from_its_description(name, tmp_path):
    """By the fields of its config.json in the run file: experts, sinks, layers of several kinds."""
    small = small_config(name)
    small.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    described = {key: fields[key] for key in fields if not key.startswith(("transformers", "architectures", "dtype"))}
    config = load(None, ["model.llm=some/where", f"model.architecture={json.dumps(described)}", *FEW])
    assert config_of(config.model).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""}
    planned = plan(config, Cluster(), prefix_tokens=20, suffix_tokens=8, speed=False)
    model = AutoModelForCausalLM.from_config(small)
    assert planned.sizes["llm_weights"] == sum(p.numel() for p in model.parameters())


def test_experts_in_four_bits_are_planned_as_they_are_stored():
    small = small_config("qwen3_moe")
    config = load(None, ["model.llm=some/where", "model.quantization=nf4_experts", "training.precision=bf16", *FEW])
    planned = {
        quantization: plan(
            config.changed({"model.quantization": quantization}),
            Cluster(), llm=small, prefix_tokens=20, suffix_tokens=8, speed=False,
        )
        for quantization in ("nf4", "nf4_experts")
    }  # fmt: skip
    experts = small.num_hidden_layers * small.num_experts * 3 * small.hidden_size * small.moe_intermediate_size
    sizes = {quantization: plan.sizes for quantization, plan in planned.items()}
    assert sizes["nf4_experts"]["packed_weights"] - sizes["nf4"]["packed_weights"] == experts
    saved = sizes["nf4"]["llm_bytes"] - sizes["nf4_experts"]["llm_bytes"]
    assert 1.4 * experts < saved < 1.5 * experts
    assert planned["nf4"].gpu_bytes - planned["nf4_experts"].gpu_bytes == saved


def test_code_that_needs_values_is_said_to(monkeypatch):
    config = load(None, ["model.llm=some/where", *FEW])

    def broken(*args, **kwargs):
        raise RuntimeError("aten::nonzero needs\nvalues")

    monkeypatch.setattr(tracing, "_run", broken)
    with pytest.raises(NotPlanned, match=r"model type 'lfm2' cannot .* \(RuntimeError: aten::nonzero needs values\)"):
        plan(config, Cluster(), llm=small_config("lfm2"), prefix_tokens=21, suffix_tokens=8)
