"""Defines the settings of training, its run folder and what it shows."""

from dataclasses import dataclass
from typing import Literal

from aullm_dist.config.allowed import Filled, OrWord, Range, above, at_least, between, share
from aullm_dist.config.setting import Occasion, Recorded, setting

_GAMMA = Range(at_least=1, or_zero=True, text="0, or a finite number from 1 (finite gradients)")
_ANYWHERE: tuple[Occasion, ...] = ("resume", "prediction", "release", "ablation")
_OF_TRAINING: tuple[Occasion, ...] = ("resume", "ablation")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Optimisation, precision, checkpoints and the run folder."""

    output: str = setting(
        "runs/demo",
        "The run folder.",
        "output",
        Filled("give the run a folder, such as runs/first"),
        may_differ=_OF_TRAINING,
        place="path",
    )
    seed: int = setting(
        0,
        "Seed of first weights, order of clips, draws, dropout and folds.",
        "function",
        between(0, 2**32 - 1),
    )
    epochs: int = setting(30, "Passes over the training clips in each fold.", "function", above(0))
    max_steps: int | None = setting(
        None, "Stop after this many optimizer steps in each fold, whatever `epochs` says.", "function", above(0)
    )
    global_batch: int = setting(
        16,
        "Clips per optimizer step over all processes; micro-batch x processes x accumulation.",
        "function",
        above(0),
    )
    micro_batch: int = setting(
        16, "Clips per forward pass of one process.", "execution", above(0), may_differ=_ANYWHERE
    )
    strategy: str = setting(
        "ddp",
        "How the run is distributed: `ddp` (every process holds everything), the name of a JSON of configs/deepspeed "
        "(`zero1`, `zero2`, `zero3`, `zero3_hpz`, and `zero2` and `zero3` with offloading) or the path of a DeepSpeed "
        "JSON of your own.",
        "execution",
        may_differ=("resume", "prediction", "ablation"),
        place="path or name",
    )
    processes: int | None = setting(
        None,
        "Processes the run must have; null accepts what the launcher started.",
        "execution",
        above(0),
        may_differ=("resume", "prediction", "ablation"),
    )
    folds_at_once: int | Literal["auto"] = setting(
        1,
        "Folds that are trained side by side, each by an equal team of the processes; `auto` takes as many as "
        "processes, folds and batch allow. With `ddp`, and with `zero3`, which then divides the frozen LLM alone, over "
        "all processes.",
        "execution",
        OrWord("auto", at_least(1)),
        may_differ=_OF_TRAINING,
    )
    cpu_threads: int | None = setting(
        None,
        "Threads of one process on a CPU machine; null shares the cores among the processes of the machine.",
        "execution",
        above(0),
        may_differ=_ANYWHERE,
    )
    check_memory: bool = setting(
        True,
        "Plan the run at its start, and refuse it where it needs more memory than is free.",
        "execution",
        may_differ=_OF_TRAINING,
    )
    precision: Literal["fp32", "bf16"] = setting(
        "fp32",
        "`bf16`: the frozen LLM is stored and computed in bf16, for GPUs; what is trained stays in float32.",
        "function",
        recorded=Recorded(),
    )
    lr_lora: float = setting(3e-4, "Learning rate of LoRA.", "function", above(0))
    lr_new: float = setting(
        1e-3, "Learning rate of visual backbone, projector, graph and read-out.", "function", above(0)
    )
    lr_led: float = setting(1e-2, "Learning rate of the few parameters of the Eulerian dynamics.", "function", above(0))
    weight_decay: float = setting(
        0.01, "Decay of matrices; vectors, gains and the Eulerian dynamics have none.", "function", at_least(0)
    )
    warmup_fraction: float = setting(
        0.05, "Share of the steps over which the learning rates rise from 0.", "function", share()
    )
    min_lr_fraction: float = setting(
        0.05, "Share of each learning rate that is left at the end of the cosine.", "function", share()
    )
    clip_norm: float = setting(
        1.0, "Largest norm of the gradient over all trained parameters; it is scaled down to it.", "function", above(0)
    )
    asl_gamma_negative: float = setting(
        0.0,
        "Exponent of the asymmetric loss for absent AUs: the larger, the less easy ones count. With both exponents and "
        "`asl_margin` at 0 it is binary cross-entropy, which measured better (docs/model.md).",
        "function",
        _GAMMA,
    )
    asl_gamma_positive: float = setting(
        0.0, "Exponent of the asymmetric loss for present AUs; 0 weighs all of them alike.", "function", _GAMMA
    )
    asl_margin: float = setting(
        0.0, "Probability below which an absent AU costs nothing in the asymmetric loss.", "function", share(0.5)
    )
    evidence_weight: float = setting(
        0.5, "Weight of the loss on the evidence's own answer, with `model.answer: stages`.", "function", at_least(0)
    )
    graph_weight: float = setting(
        0.3,
        "Weight of the loss on the graph's own answer: read of the instruction token, or of the nodes with "
        "`model.answer: deduction`.",
        "function",
        at_least(0),
    )
    max_bad_steps: int = setting(
        3,
        "Consecutive steps with a non-finite loss or gradient that are skipped before the run stops.",
        "function",
        above(0),
    )
    evaluate_every_epochs: int = setting(
        5, "Epochs from one evaluation of inner and test clips to the next; the end has one too.", "output", above(0)
    )
    save_every_steps: int | None = setting(
        None,
        "Write a checkpoint this often; null writes one per evaluation.",
        "output",
        above(0),
        may_differ=_OF_TRAINING,
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints of each fold that are kept.", "output", above(0), may_differ=_OF_TRAINING
    )
    verify: Literal["hash", "size"] = setting(
        "hash",
        "How a resume checks a checkpoint: `hash` reads every byte, `size` sizes and tensor headers only.",
        "execution",
        may_differ=_OF_TRAINING,
    )
    grace_seconds: float = setting(
        300.0,
        "Seconds between the signal that ends a job (SIGUSR1, SIGTERM) and its end; a run warns when what it has to do "
        "in between takes longer. launchers/slurm.sh asks SLURM for as many.",
        "execution",
        above(0),
        may_differ=_OF_TRAINING,
    )
    max_failures: int = setting(
        3,
        "How often launchers/slurm.sh starts a job again that has failed, and then only if it had completed a step.",
        "execution",
        at_least(0),
        may_differ=_OF_TRAINING,
    )
    baseline: bool | tuple[str, ...] = setting(
        False,
        "Also train these networks without an LLM on the same folds, below the run folder: names as `model.network` "
        "has them. `true` is [led_cnn].",
        "output",
        may_differ=("ablation",),
    )
    deterministic: bool = setting(
        True, "Ask torch for deterministic algorithms; a resumed CPU run is then bit-identical.", "execution"
    )

    def baselines(self) -> tuple[str, ...]:
        """Return the names of the networks to train in addition to the run."""
        if isinstance(self.baseline, bool):
            return ("led_cnn",) if self.baseline else ()
        return self.baseline

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches of one process in an optimizer step."""
        return self.global_batch // (self.micro_batch * processes)


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Trackers that Accelerate knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """TensorBoard and console."""

    tensorboard: bool = setting(True, "Write event files for TensorBoard.", "output", may_differ=_OF_TRAINING)
    trackers: tuple[str, ...] = setting(
        (),
        "Also log scalars and pictures to these trackers, through Accelerate: aim, clearml, comet_ml, dvclive, mlflow, "
        "swanlab, trackio, wandb, or a GeneralTracker of your own as `package.module:Class`. tensorboard may stand "
        "among them; it is written as `monitor.tensorboard` says.",
        "output",
        may_differ=_OF_TRAINING,
    )
    log_every_steps: int = setting(
        5, "Steps from one line of losses and times to the next.", "output", above(0), may_differ=_OF_TRAINING
    )
    communication_every_steps: int = setting(
        50,
        "Every so many steps the wait for other processes is measured as well; 0 never does.",
        "output",
        at_least(0),
        may_differ=_OF_TRAINING,
    )
    images: bool = setting(
        True,
        "Whether event files show faces: evidence over frames, thumbnails of the projector. Some licences forbid it.",
        "output",
        may_differ=_OF_TRAINING,
    )
    clips: int = setting(
        4,
        "Held-out clips, always the same, whose evidence and AU graph are drawn at each evaluation; 0 draws none.",
        "output",
        at_least(0),
        may_differ=_OF_TRAINING,
    )
    projector_clips: int = setting(
        200,
        "Held-out clips at most in the embedding projector, which the newest evaluation renews; 0 leaves it out.",
        "output",
        at_least(0),
        may_differ=_OF_TRAINING,
    )

    @property
    def watched(self) -> bool:
        """Whether anything is written while a run trains."""
        return self.tensorboard or any(name != "tensorboard" for name in self.trackers)
