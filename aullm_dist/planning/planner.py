"""Plans a run: what each process holds at each moment of it, what it sends, what it computes, and how fast.

Nothing here is fitted to a measurement. Parameters are those of the modules that the trainer builds, activations those
of passes on shape-only tensors (`trace`), gathering follows DeepSpeed's rules (`gathering`), and what engines hold
follows their code (`engines`). Left out is what no dimension of the model tells: the libraries' own memory, the CUDA
context, NCCL's buffers, the allocator's rounding. `Cluster.reserve` stands for those.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from aullm_dist.config import Config, choose_groups, load_strategy, refuse_other_sharding, to_dict
from aullm_dist.config.checks import check
from aullm_dist.errors import UserError
from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.llm.architecture import config_of
from aullm_dist.model.counterfactual import Counts, branching, mean_and_largest
from aullm_dist.model.prompt import Prompt
from aullm_dist.model.reasoner import tokens_computed
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.costs import Network, Speed, network_of, speed_of
from aullm_dist.planning.engines import Engine, Term
from aullm_dist.planning.gathering import Gatherer
from aullm_dist.planning.loading import load_terms
from aullm_dist.planning.prompts import PlannedPrompt, plan_prompt
from aullm_dist.planning.saving import save_terms
from aullm_dist.planning.skeleton import Weight, build, weights_of
from aullm_dist.planning.trace import Passes, trace

PHASES = ("load", "start", "step", "evaluation", "save")
_EVALUATED = Counts(1, 1, 1, 1)


class NotPlanned(UserError):
    """A model type whose code the planner cannot run; training may."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The memory peak of one part of a run, of the process that takes most, in terms that add up to it."""

    name: str
    terms: tuple[Term, ...]

    def total(self, on_host: bool) -> int:
        """Return bytes on the GPU, or in the machine's memory."""
        return sum(term.nbytes for term in self.terms if term.on_host == on_host)

    @property
    def both(self) -> int:
        """Bytes of a process that computes on a CPU, where all memory is one."""
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on a cluster.

    Attributes:
        config: the run's configuration.
        cluster: the machines.
        engine: the strategy in words.
        sizes: weights of the LLM, of LoRA and of the other modules, tokens of the prompt, micro-batches, and so on.
        phases: memory.
        network: what is sent.
        speed: arithmetic; None where only memory was asked for.
        activations: bytes at most of the passes of a micro-batch, by `model.activation_checkpointing`; None likewise.
        assumptions: what the numbers rest on and nobody has checked.
    """

    config: Config
    cluster: Cluster
    engine: str
    sizes: dict[str, int]
    phases: tuple[Phase, ...]
    network: Network
    speed: Speed | None
    activations: dict[str, int] | None
    assumptions: tuple[str, ...]

    @property
    def gpu_peak(self) -> Phase:
        """The phase in which a GPU holds most."""
        return max(self.phases, key=lambda phase: phase.both if self.cluster.cpu else phase.total(False))

    @property
    def gpu_bytes(self) -> int:
        """Its bytes, the reserve left out."""
        return self.gpu_peak.both if self.cluster.cpu else self.gpu_peak.total(False)

    @property
    def host_bytes(self) -> int:
        """Bytes that the processes of one machine hold in its memory at most, in addition to their libraries.

        Process 0 alone collects what is saved.
        """
        each = max(phase.total(True) for phase in self.phases if phase.name != "save")
        kept = next(phase for phase in self.phases if phase.name == "evaluation").total(True)
        saver = next(phase for phase in self.phases if phase.name == "save").total(True) - kept
        return each * self.cluster.per_node + max(0, saver)

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where no memory was given."""
        given = [
            (self.gpu_bytes + self.cluster.reserve, self.cluster.gpu_memory),
            (self.host_bytes, self.cluster.host_memory),
        ]
        known = [needed <= there for needed, there in given if there is not None]
        return all(known) if known else None


def plan(
    config: Config,
    cluster: Cluster,
    *,
    llm: PretrainedConfig | None = None,
    prefix_tokens: int | None = None,
    suffix_tokens: int | None = None,
    speed: bool = True,
) -> Plan:
    """Plan a run. No weights are read, no GPU is used, nothing is downloaded.

    Args:
        config: the run's configuration.
        cluster: the machines; `training.processes` is set to its GPUs.
        llm: config of the LLM where it is known already; None takes it from `model.llm` or `model.architecture`.
        prefix_tokens: tokens that all branches share; None counts or estimates them.
        suffix_tokens: tokens of one branch; None counts or estimates them.
        speed: whether to tell operations and the other kind of checkpointing too, which takes two more traces.

    Raises:
        UserError: the architecture is not known, or this model, batch or strategy cannot work, with the reason.
    """
    if config.model.llm == "none":
        raise UserError(
            "model.llm is none: the baseline has no LLM and takes well below 1 GiB; there is nothing to plan"
        )
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, processes=cluster.gpus))
    check(config)
    strategy = load_strategy(config.training.strategy)
    refuse_other_sharding(strategy, config.training)
    teams = choose_groups(config.training, cluster.gpus, cluster.gpus)
    team = cluster.gpus // teams
    deepspeed = strategy.resolved(config.training, cluster.gpus, cluster.per_node) if teams == 1 else strategy.deepspeed
    accumulation = config.training.accumulation(team)
    engine = Engine.of(deepspeed, cluster.gpus, accumulation, cluster.cpu, team)
    planned = plan_prompt(config, prefix_tokens, suffix_tokens)
    llm = llm or config_of(config.model)
    model = _Model(config, planned.prompt, llm)
    with _refusing_what_runs_on_values_alone(llm):
        return _plan(model, engine, cluster, planned, accumulation, speed)


@contextlib.contextmanager
def _refusing_what_runs_on_values_alone(llm: PretrainedConfig) -> Iterator[None]:
    """Turn what modelling code raises for shape-only tensors into one line.

    Raises:
        NotPlanned: naming the model type and what was raised.
    """
    try:
        yield
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise NotPlanned(
            f"model type {llm.model_type!r} cannot be planned: its code does not run on the meta device "
            f"({in_one_line(error)}); its layers, batch and strategy may work all the same"
        ) from error


def _plan(
    model: "_Model", engine: Engine, cluster: Cluster, planned: PlannedPrompt, accumulation: int, speed: bool
) -> Plan:
    config = model.config
    teams = choose_groups(config.training, cluster.gpus, cluster.gpus)
    weights = model.weights(in_pieces=cluster.gpus > 1 or engine.stage == 3)
    gatherer = _gatherer(engine, weights)
    step, sent, persistent = _step(model, engine, gatherer, weights)
    evaluation = _evaluation(model, engine, gatherer, weights)
    resting = (*engine.base(weights), *engine.trained(weights))
    phases = (
        Phase("load", tuple(load_terms(engine, weights, model.llm.hidden_size))),
        Phase("start", (*engine.base(weights), *engine.at_start(weights))),
        step,
        evaluation,
        Phase("save", (*resting, *save_terms(engine, weights))),
    )
    messages = engine.sends_per_step(weights, sent, persistent)
    network = network_of(engine, cluster, weights, messages)
    return Plan(
        config=config,
        cluster=cluster,
        engine=config.training.strategy,
        sizes=_sizes(model, weights, accumulation) | ({"folds_at_once": teams} if teams > 1 else {}),
        phases=phases,
        network=network,
        speed=model.speed(weights, cluster, engine, network) if speed else None,
        activations=_both_activations(model, engine) if speed else None,
        assumptions=(planned.assumption, *_assumptions(cluster)),
    )


def _gatherer(engine: Engine, weights: list[Weight]) -> Gatherer | None:
    if engine.stage < 3:
        return None
    among = engine.second if engine.second > 1 else engine.processes
    if engine.is_plain:
        weights = [w for w in weights if not w.trainable]
    return Gatherer(weights, among, engine.limits, copies_on_receipt=engine.cpu and engine.processes > 1)


class _Model:
    """The run's model, traced when it is asked for."""

    def __init__(self, config: Config, prompt: Prompt, llm: PretrainedConfig) -> None:
        self.config, self.prompt, self.llm = config, prompt, llm
        self.mean, self.most = mean_and_largest(*branching(config, has_graph=config.model.structure))

    def weights(self, in_pieces: bool) -> list[Weight]:
        key = (_key(self.config, self.llm), in_pieces)
        if key not in _WEIGHTS:
            _WEIGHTS[key] = weights_of(build(self.config, self.llm, self.prompt, in_pieces), self.config)
        return _WEIGHTS[key]

    def passes(self, counts: Counts, training: bool, engine: Engine) -> Passes:
        # With accumulation the gradients of earlier micro-batches are a term of their own.
        keeps = training and engine.is_plain and engine.accumulation == 1
        sizes = (self.prompt.prefix_tokens, self.prompt.suffix_tokens)
        key = (_key(self.config, self.llm), sizes, counts, training, keeps, engine.stage == 3)
        return _passes(key, self.config, self.llm, self.prompt)

    def speed(self, weights: list[Weight], cluster: Cluster, engine: Engine, network: Network) -> Speed:
        training = self.config.training
        mean = self.mean.times(training.micro_batch)
        # One process, with accumulation: the same passes for every engine, so that one trace serves all.
        flops = self.passes(mean, True, Engine.of(None, 1, 2, cluster.cpu)).flops
        tokens = self.tokens(mean)
        clips = training.global_batch * (engine.processes // engine.team)
        return speed_of(weights, cluster, network, tokens, engine.accumulation, flops, clips)

    def tokens(self, counts: Counts) -> int:
        """LLM tokens of a micro-batch."""
        return _tokens(self.config, self.prompt, int(counts.branches))


def _tokens(config: Config, prompt: Prompt, branches: int) -> int:
    model = config.model
    layout = (model.packing, model.suffixes_per_row, model.suffix_multiple)
    return tokens_computed(branches, prompt.prefix_tokens, prompt.suffix_tokens, *layout)


_TRACES: dict[tuple, Passes] = {}
_WEIGHTS: dict[tuple, list[Weight]] = {}


def _key(config: Config, llm: PretrainedConfig) -> str:
    """Return what decides how a model is built and what its passes allocate, but for their sizes."""
    groups = to_dict(config)
    parts = [groups["model"], groups["data"], config.training.precision]
    return json.dumps([*parts, llm.to_dict()], default=str, sort_keys=True)


def _passes(key: tuple, config: Config, llm: PretrainedConfig, prompt: Prompt) -> Passes:
    if key not in _TRACES:
        _, _, counts, training, keeps, divided = key
        _TRACES[key] = trace(config, llm, prompt, counts, training=training, keep_gradients=keeps, divided=divided)
    return _TRACES[key]


def _step(model: _Model, engine: Engine, gatherer: Gatherer | None, weights: list[Weight]) -> tuple[Phase, int, int]:
    """Return the peak of an optimizer step, and bytes of gathering in a micro-batch and between steps."""
    passes = model.passes(model.most.times(model.config.training.micro_batch), True, engine)
    resting = [*engine.base(weights), *engine.trained(weights)]
    whole: list[Term] = []
    sent = persistent = 0
    if gatherer is None:
        computing = _activations(passes.peak, passes.saved)
    else:
        # The first call learns the order, the second shows what knowing it does.
        gatherer.passes(passes.records)
        gatherer.partition_all()
        found = gatherer.passes(passes.records)
        gatherer.partition_all()
        sent, persistent = found.messages, gatherer.persistent_messages()
        whole = [Term("small parameters, whole", sum(w.nbytes for w in gatherer.persistent))]
        rest = found.peak - found.parameters - found.in_transit
        computing = [
            Term("gathered parameters", found.parameters),
            Term("parameters on their way", found.in_transit),
            *_activations(rest, found.saved),
        ]
    moments = [
        [*engine.during_passes(weights), *computing],
        [*whole, *engine.at_end_of_backward(weights)],
        [*whole, *engine.at_optimizer(weights)],
    ]
    worst = max(moments, key=lambda terms: sum(t.nbytes for t in terms if engine.cpu or not t.on_host))
    return Phase("step", (*resting, *worst)), sent, persistent


def _both_activations(model: _Model, engine: Engine) -> dict[str, int]:
    """Return the peak of a micro-batch's passes without parameters, as the run file has it and the other way."""
    own = model.config.model.activation_checkpointing
    peaks = {}
    for kind in ("none", own if own != "none" else "non_reentrant"):
        changed = dataclasses.replace(model.config.model, activation_checkpointing=kind)
        other = _Model(dataclasses.replace(model.config, model=changed), model.prompt, model.llm)
        peaks[kind] = other.passes(other.most.times(model.config.training.micro_batch), True, engine).peak
    return peaks


def _activations(peak: int, saved: int) -> list[Term]:
    saved = min(saved, peak)
    return [Term("activations that are kept", saved), Term("workspace of the layer at work", peak - saved)]


def _evaluation(model: _Model, engine: Engine, gatherer: Gatherer | None, weights: list[Weight]) -> Phase:
    """Return the peak of answering held-out clips."""
    passes = model.passes(_EVALUATED.times(model.config.training.micro_batch), False, engine)
    resting = [*engine.base(weights), *engine.trained(weights)]
    if gatherer is None:
        return Phase("evaluation", (*resting, Term("workspace of the layer at work", passes.peak)))
    # One pass for the answers, one without each soft token; what the first leaves whole the next finds.
    found = max((gatherer.passes(passes.records) for _ in range(3)), key=lambda result: result.peak)
    gatherer.partition_all()
    terms = [
        Term("gathered parameters", found.parameters),
        Term("parameters on their way", found.in_transit),
        Term("workspace of the layer at work", found.peak - found.parameters - found.in_transit),
    ]
    return Phase("evaluation", (*resting, *terms))


def _sizes(model: _Model, weights: list[Weight], accumulation: int) -> dict[str, int]:
    lora = sum(w.numel for w in weights if "lora_" in w.name)
    trained = sum(w.numel for w in weights if w.trainable)
    training = model.config.training
    most, mean = (counts.times(training.micro_batch) for counts in (model.most, model.mean))
    return {
        "llm_weights": sum(w.weights for w in weights if not w.trainable),
        "packed_weights": sum(w.weights for w in weights if w.constants),
        "packed_bytes": sum(w.nbytes + w.constants for w in weights if w.constants),
        "llm_bytes": sum(w.nbytes + w.constants for w in weights if not w.trainable),
        "lora_weights": lora,
        "other_trained_weights": trained - lora,
        "layers": model.llm.num_hidden_layers,
        "prefix_tokens": model.prompt.prefix_tokens,
        "suffix_tokens": model.prompt.suffix_tokens,
        "branches_mean": int(mean.branches),
        "branches_most": int(most.branches),
        "tokens_mean": model.tokens(mean),
        "tokens_most": model.tokens(most),
        "micro_batches": accumulation,
        "global_batch": training.global_batch,
    }


def _assumptions(cluster: Cluster) -> tuple[str, ...]:
    what = "process" if cluster.cpu else "GPU"
    assumed = ["memory is that of the largest draw of branches, speed that of the mean"]
    if cluster.cpu:
        assumed.insert(0, "the memory of the libraries themselves is not planned")
    else:
        assumed.insert(
            0,
            f"{cluster.reserve / 2**30:.1f} GiB of a GPU for its context, NCCL and the allocator (--reserve); the "
            "libraries' own memory is not planned",
        )
    if cluster.gpu_flops is None:
        return ("nothing of how fast a CPU computes: --gpu-flops, of one process, adds times and rates", *assumed)
    defaults = "" if cluster.cpu else "the defaults are an H100's datasheet, bf16 without sparsity, and a guess "
    return (
        f"{cluster.gpu_flops / 1e12:.3g} TFLOP/s at the peak of a {what}, a step reaching {cluster.efficiency:.0%} of "
        f"it; {defaults}(--gpu-flops, --efficiency)",
        f"{cluster.link / 1e9:.0f} GB/s into a {what} from its machine, {cluster.interconnect / 1e9:.0f} GB/s into "
        "a machine from the others (--link, --interconnect)",
        *assumed,
    )
