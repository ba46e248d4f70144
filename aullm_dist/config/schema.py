"""The dataclasses of a run's configuration; the attribute text under a field is its documentation."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network: backbone LLM, LoRA, projector, AU graph and read-out."""

    llm: str = "tiny"
    """Hugging Face name or local folder of a decoder, `tiny` (built locally) or `none` (the `led_cnn` baseline)."""
    architecture: dict[str, Any] | None = None
    """What `llm` is, as the fields of its config.json that say its sizes (`model_type`, `hidden_size`,
    `num_hidden_layers`, ...): `aullm-dist plan` needs no files then. A config.json that is found must agree."""
    llm_architecture: Literal["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"] = "llama"
    """Architecture of the `tiny` backbone; other backbones bring their own. `gemma3` is the text decoder."""
    llm_hidden: int = 128
    """Width of the `tiny` backbone."""
    llm_layers: int = 4
    """Decoder layers of the `tiny` backbone."""
    attention: Literal["auto", "prefix", "sdpa", "eager", "flex"] = "auto"
    """How packed branches attend: `prefix` computes only what a suffix sees, `sdpa` and `eager` take a dense mask,
    `flex` (FlexAttention, GPUs only) a block mask.
    `auto` is `prefix` with packing and `sdpa` without, or `eager` where the backbone has no sdpa (Gemma 2)."""
    trust_remote_code: bool = False
    """Run model code that ships with a checkpoint. Off, because it executes what the publisher wrote."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the linear layers of the frozen decoder in 4 bits (bitsandbytes, double quantisation), quantised while
    loading or taken as stored, and computed in `training.precision`."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear layers that get LoRA: `all-linear`, or module names such as `q_proj`."""
    activation_checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none"
    """Recompute the decoder's activations in the backward pass: less memory, about a third more time. Both kinds give
    the same gradients; `non_reentrant` is PyTorch's recommendation."""
    readout: Literal["last", "per_au"] = "last"
    packing: bool = True
    """One shared-prefix sequence per step (true) or one padded row per branch (false, the reference path)."""
    suffixes_per_row: int = 0
    """Suffixes in one packed row; 0 puts the whole micro-batch into one row."""
    suffix_multiple: int = 1
    """Fill a packed row up, with suffixes that nobody reads, until their number is a multiple of this. Interventions
    are drawn, so rows differ in length; with a multiple there are few lengths, for `compile` and for the GPU's
    allocator. The answers are the same; the fillers count as tokens. 1 fills up nothing."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: torch.compile for each decoder layer, at its first call. Not with ZeRO-3."""
    evidence: Literal["full", "mid_only", "high_only", "no_attention"] = "full"
    """What the content token is made of; all but `full` are ablations."""
    evidence_heads: int = 4
    structure: bool = True
    """Whether the R-AUGNN and its instruction token are there; false is an ablation."""
    graph_width: int = 64
    graph_heads: int = 4
    graph_layers: int = 2
    training_statistics: bool = False
    """Start the edge strengths from the training fold's co-activations instead of the literature alone."""
    dropout: float = 0.1
    """Dropout of visual backbone, projector and graph."""
    kernels: Literal["auto", "triton", "torch", "interpret"] = "auto"
    """Implementation of evidence_pool and graph_attention: `auto` is Triton on a GPU that it has configurations for and
    plain PyTorch elsewhere; `interpret` runs the Triton kernels on the CPU, slowly, to check them."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Corpora, protocol and the way clips become tensors."""

    train: list[str] = field(default_factory=list)
    """Prepared dataset folders (`aullm-dist prepare`). Empty: a synthetic corpus is generated below the run folder."""
    test: list[str] = field(default_factory=list)
    """Prepared dataset folders of the target corpus; for `protocol: cross` only."""
    protocol: Literal["loso", "grouped", "cross", "lodo", "composite", "all"] = "loso"
    """`loso` leaves one subject out, `grouped` whole groups of them, `cross` goes from `train` to `test`, `lodo` leaves
    one corpus out (CD6ME), `composite` one subject of several corpora; `all` has no test side."""
    folds_file: str | None = None
    """Folds to train on, as `aullm-dist folds` or a hand wrote them; protocol and AUs are then the file's."""
    fold: int | None = None
    """Train this fold only; null trains all folds one after another."""
    folds: int = 5
    """Number of folds of `protocol: grouped`."""
    aus: list[int] = field(default_factory=list)
    """AUs under test; empty takes the field's set for the corpora."""
    inner_fraction: float = 0.15
    """Share of a fold's training subjects held out to choose decision thresholds."""
    num_frames: int = 6
    size: int = 64
    """Image side in pixels; prepared datasets must have been written with the same `--size`."""
    crops: list[str] = field(default_factory=list)
    """Crops of the prepared datasets, by name; others are refused. Empty takes, and records, those that they have."""
    cut_fraction: float = 0.2
    """Training clips lose at most this share of their frames at either end, drawn anew each epoch."""
    augment: bool = True
    """Random temporal cut, small shift and gain of training clips."""
    shuffle_labels: bool = False
    """Negative control: gives each training clip the labels of another. Scores must then fall to the floors."""
    streaming: bool = False
    """Read training clips in a shuffled stream from Parquet files (`aullm-dist prepare --format parquet`) and not by
    random access: for corpora on slow or remote disks. The order then depends on the number of processes, and one
    loader process reads it, whatever `workers` says."""
    shuffle_buffer: int = 256
    """Clips of a stream that are shuffled together, and held in memory by each loader process."""
    workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    synthetic_corpus: Literal["casme2", "samm", "4dme", "casme", "mmew", "casme3a", "casme3c"] = "casme2"
    synthetic_subjects: int = 20
    synthetic_clips: int = 12
    """Clips per synthetic subject."""
    synthetic_amplitude: float = 3.0
    """Peak movement of the synthetic faces in % of face width; smaller is harder."""
    synthetic_frames: int | None = None
    """Fewest frames of a synthetic clip, the longest having twice as many; null takes the corpus's own clip lengths."""
    synthetic_balance: float = 0.5
    """0: AU combinations about as frequent as in the real corpus; 1: all AUs about equally frequent."""
    synthetic_shift: Literal["none", "corpus", "vignette_banding"] = "corpus"
    synthetic_seed: int = 0


@dataclass(kw_only=True, slots=True)
class CounterfactualConfig:
    """Counterfactual Consistency Regularization: interventions, their chances and weights."""

    enabled: bool = True
    branches: int = 2
    """Different interventions drawn per clip and step, at most as many as have a probability above 0."""
    structure_probability: float = 1.0
    """Relative chance of this intervention among those that a clip can draw; 0 leaves it out. The same holds for
    `appearance_probability` and `neutral_probability`."""
    structure_weight: float = 0.5
    structure_edges: float = 0.15
    """Largest share of the prior's edges that one structure intervention cuts or rewires."""
    appearance_probability: float = 1.0
    appearance_weight: float = 0.5
    neutral_probability: float = 1.0
    neutral_weight: float = 0.5
    contradiction_weight: float = 0.5
    """Weight of the crossed pairs that make the LLM use both tokens; 0 leaves them out. They accompany the neutral
    intervention and need the graph; a run says at its start whether they are on."""
    contradiction_margin: float = 0.1
    """Probability by which a structure must count more on matching than on neutral evidence."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Optimisation, precision, checkpoints and the run folder."""

    output: str = "runs/demo"
    seed: int = 0
    epochs: int = 30
    max_steps: int | None = None
    """Stop after this many optimizer steps in each fold, whatever `epochs` says."""
    global_batch: int = 16
    """Clips per optimizer step over all processes; micro-batch x processes x accumulation."""
    micro_batch: int = 16
    """Clips per forward pass of one process."""
    strategy: str = "ddp"
    """How the run is distributed: `ddp` (every process holds everything), the name of a JSON of configs/deepspeed
    (`zero1`, `zero2`, `zero3`, `zero3_hpz`, and `zero2` and `zero3` with offloading) or the path of a DeepSpeed JSON of
    your own."""
    processes: int | None = None
    """Processes the run must have; null accepts what the launcher started."""
    cpu_threads: int | None = None
    """Threads of one process on a CPU machine; null shares the cores among the processes of the machine."""
    check_memory: bool = True
    """Plan the run at its start, and refuse it where it needs more memory than is free."""
    precision: Literal["fp32", "bf16"] = "fp32"
    lr_lora: float = 3e-4
    lr_new: float = 1e-3
    """Learning rate of visual backbone, projector, graph and read-out."""
    lr_led: float = 1e-2
    """Learning rate of the few parameters of the Eulerian dynamics."""
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    min_lr_fraction: float = 0.05
    clip_norm: float = 1.0
    asl_gamma_negative: float = 2.0
    asl_gamma_positive: float = 0.0
    asl_margin: float = 0.05
    graph_weight: float = 0.3
    """Weight of the auxiliary per-AU loss on the graph's nodes."""
    max_bad_steps: int = 3
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""
    evaluate_every_epochs: int = 5
    save_every_steps: int | None = None
    """Write a checkpoint this often; null writes one per evaluation."""
    keep_checkpoints: int = 2
    verify: Literal["hash", "size"] = "hash"
    """How a resume checks a checkpoint: `hash` reads every byte, `size` sizes and tensor headers only."""
    grace_seconds: float = 300.0
    """Seconds between the signal that ends a job (SIGUSR1, SIGTERM) and its end; a run warns when what it has to do
    in between takes longer. launchers/slurm.sh asks SLURM for as many."""
    max_failures: int = 3
    """How often launchers/slurm.sh starts a job again that has failed, and then only if it had completed a step."""
    baseline: bool = False
    """Also train the no-LLM baseline `led_cnn` on the same folds, below the run folder."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms; a resumed CPU run is then bit-identical."""

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches of one process in an optimizer step."""
        return self.global_batch // (self.micro_batch * processes)


@dataclass(kw_only=True, slots=True)
class MonitorConfig:
    """TensorBoard and console."""

    tensorboard: bool = True
    log_every_steps: int = 5
    communication_every_steps: int = 50
    """Every so many steps the wait for other processes is measured as well; 0 never does."""
    images: bool = True
    """Whether event files show faces: evidence over frames, thumbnails of the projector. Some licences forbid it."""
    clips: int = 4
    """Held-out clips, always the same, whose evidence and AU graph are drawn at each evaluation; 0 draws none."""
    projector_clips: int = 200
    """Held-out clips at most in the embedding projector, which the newest evaluation renews; 0 leaves it out."""


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    counterfactual: CounterfactualConfig = field(default_factory=CounterfactualConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
