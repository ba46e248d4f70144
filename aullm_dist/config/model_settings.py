"""Defines the settings of the network and of its counterfactual training."""

from dataclasses import dataclass
from typing import Any, Literal

from aullm_dist.config.allowed import SHARE_BELOW_1, Filled, Range, above, at_least, share
from aullm_dist.config.setting import Recorded, setting

NETWORKS = ("led_cnn", "led_sssnet", "sssnet_of", "evidence")
"""Networks without an LLM that are shipped."""
BUILT = ("tiny", "smollm2")
"""LLMs that a run writes below its own folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network: backbone LLM, LoRA, projector, AU graph and read-out."""

    llm: str = setting(
        "tiny",
        "Hugging Face name or local folder of a decoder, `tiny` (random, built locally), `smollm2` "
        "(SmolLM2-135M-Instruct of an installed package) or `none` (`network` alone).",
        "function",
        Filled("give a folder, a Hugging Face name, tiny or none"),
        may_differ=("prediction", "release"),  # where it lies; what it is, is compared
        llm_only=True,
        place="path or name",
    )
    network: str = setting(
        "led_cnn",
        "The network of a run with `llm: none`: `led_cnn`, `led_sssnet`, `sssnet_of`, `evidence` (docs/model.md), or "
        "`package.module:Class`, a network of your own.",
        "function",
        may_differ=("ablation",),
    )
    visual: Literal["led", "flow", "both"] = setting(
        "flow",
        "What the visual stream sees: `flow` the optical flow of each sampled frame against the first, computed by the "
        "loader processes; `led` learnable Eulerian dynamics of the gray frames; `both` of them.",
        "function",
        recorded=Recorded("visual"),
        may_differ=("ablation",),
        llm_only=True,
    )
    architecture: dict[str, Any] | None = setting(
        None,
        "What `llm` is, as the fields of its config.json that say its sizes (`model_type`, `hidden_size`, "
        "`num_hidden_layers`, ...): `aullm-dist plan` needs no files then. A config.json that is found must agree.",
        "execution",
        may_differ=("resume", "ablation"),  # describes `llm`, and must agree with what is loaded
        llm_only=True,
    )
    llm_architecture: Literal["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"] = setting(
        "llama",
        "Architecture of the `tiny` backbone; other backbones bring their own. `gemma3` is the text decoder.",
        "function",
        llm_only=True,
    )
    llm_hidden: int = setting(
        128, "Width of the `tiny` backbone.", "function", Range(above=0, multiple_of=32), llm_only=True
    )
    llm_layers: int = setting(4, "Decoder layers of the `tiny` backbone.", "function", above(0), llm_only=True)
    attention: Literal["auto", "prefix", "sdpa", "eager", "flex"] = setting(
        "auto",
        "How packed branches attend: `prefix` computes only what a suffix sees, `sdpa` and `eager` take a dense mask, "
        "`flex` (FlexAttention, GPUs only) a block mask. `auto` is `prefix` with packing and `sdpa` without, or "
        "`eager` where the backbone has no sdpa (Gemma 2).",
        "execution",
        may_differ=("prediction", "ablation"),
        llm_only=True,
    )
    trust_remote_code: bool = setting(
        False,
        "Run model code that ships with a checkpoint. Off, because it executes what the publisher wrote.",
        "execution",
        may_differ=("prediction", "ablation"),
        llm_only=True,
    )
    quantization: Literal["none", "nf4", "nf4_experts"] = setting(
        "none",
        "`nf4`: the linear layers of the frozen decoder in 4 bits (bitsandbytes, double quantisation), quantised while "
        "loading or taken as stored, and computed in `training.precision`. `nf4_experts`: fused experts as well, "
        "quantised while loading; with `nf4` they stay in 16 bits.",
        "function",
        # The same LLM in 4 bits is another function, which an adapter trained with the other does not fit.
        recorded=Recorded("quantization"),
        llm_only=True,
    )
    lora_rank: int = setting(
        16,
        "Rank of the LoRA adapters.",
        "function",
        at_least(
            1,
            "1 or more: the LLM is trained through LoRA alone, full fine-tuning is not offered and NF4 cannot take it",
        ),
        recorded=Recorded(),
        llm_only=True,
    )
    lora_alpha: float = setting(
        32.0,
        "Scale of the LoRA adapters: what they add is multiplied by `lora_alpha` / `lora_rank`.",
        "function",
        above(0),
        recorded=Recorded(),
        llm_only=True,
    )
    lora_dropout: float = setting(
        0.0, "Dropout of what goes into the LoRA adapters.", "function", SHARE_BELOW_1, llm_only=True
    )
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",),
        "Linear layers that get LoRA: `all-linear`, or module names such as `q_proj`.",
        "function",
        Filled("allowed: [all-linear] or names of linear layers such as [q_proj]"),
        recorded=Recorded(),
        llm_only=True,
    )
    activation_checkpointing: Literal["none", "non_reentrant", "reentrant"] = setting(
        "none",
        "Recompute the decoder's activations in the backward pass: less memory, about a third more time. Both kinds "
        "give the same gradients; `non_reentrant` is PyTorch's recommendation.",
        "execution",
        llm_only=True,
    )
    readout: Literal["last", "per_au"] = setting(
        "last",
        "What the AU heads read: the last token's hidden state (`last`), or that of a marker token per AU (`per_au`).",
        "function",
        recorded=Recorded("readout"),
        llm_only=True,
    )
    answer: Literal["stages", "deduction"] = setting(
        "stages",
        "`stages`: evidence, structure and deduction each give logits, which add up to the answer. `deduction`: the "
        "LLM's head answers alone; a checkpoint that does not say is of this kind.",
        "function",
        may_differ=("ablation",),
        recorded=Recorded("answer"),
        llm_only=True,
    )
    packing: bool = setting(
        True,
        "One shared-prefix sequence per step (true) or one padded row per branch (false, the reference path).",
        "execution",
        may_differ=("prediction", "ablation"),
        recorded=Recorded(),
        llm_only=True,
    )
    suffixes_per_row: int = setting(
        0,
        "Suffixes in one packed row; 0 puts the whole micro-batch into one row.",
        "execution",
        at_least(0),
        may_differ=("prediction", "ablation"),
        recorded=Recorded(),
        llm_only=True,
    )
    suffix_multiple: int = setting(
        1,
        "Add padding suffixes to a packed row until their number is a multiple of this. "
        "Interventions are drawn, so rows differ in length; with a multiple there are few lengths, for `compile` and "
        "for the GPU's allocator. The answers are the same; the fillers count as tokens. 1 fills up nothing.",
        "execution",
        above(0),
        may_differ=("prediction", "ablation"),
        llm_only=True,
    )
    compile: Literal["none", "blocks"] = setting(
        "none",
        "`blocks`: torch.compile for each decoder layer, at its first call. Not with ZeRO-3.",
        "execution",
        may_differ=("prediction", "ablation"),
        llm_only=True,
    )
    evidence: Literal["full", "mid_only", "high_only", "no_attention"] = setting(
        "full",
        "What the content token is made of; all but `full` are ablations.",
        "function",
        may_differ=("ablation",),
        recorded=Recorded("evidence"),
        llm_only=True,
    )
    evidence_heads: int = setting(
        4,
        "Attention heads that choose the content token's evidence.",
        "function",
        above(0),
        recorded=Recorded("evidence_heads"),
        llm_only=True,
    )
    structure: bool = setting(
        True,
        "Whether the R-AUGNN and its instruction token are there; false is an ablation.",
        "function",
        may_differ=("ablation",),
        recorded=Recorded("structure"),
        llm_only=True,
    )
    graph_width: int = setting(
        64, "Width of the R-AUGNN's nodes.", "function", above(0), recorded=Recorded("graph"), llm_only=True
    )
    graph_heads: int = setting(
        4, "Attention heads of the R-AUGNN.", "function", above(0), recorded=Recorded("graph"), llm_only=True
    )
    graph_layers: int = setting(
        2, "Layers of the R-AUGNN.", "function", above(0), recorded=Recorded("graph"), llm_only=True
    )
    training_statistics: bool = setting(
        False,
        "Start the edge strengths from the training fold's co-activations instead of the literature alone.",
        "function",
        llm_only=True,
    )
    dropout: float = setting(0.1, "Dropout of visual backbone, projector and graph.", "function", SHARE_BELOW_1)
    kernels: Literal["auto", "triton", "torch", "interpret"] = setting(
        "auto",
        "Implementation of evidence_pool and graph_attention: `auto` is Triton on a GPU that it has configurations for "
        "and plain PyTorch elsewhere; `interpret` runs the Triton kernels on the CPU, slowly, to check them.",
        "execution",
        may_differ=("prediction", "ablation"),
        llm_only=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterfactualConfig:
    """Counterfactual Consistency Regularization: interventions, their chances and weights."""

    enabled: bool = setting(
        False,
        "Whether interventions are drawn at all. Off, because they cost about a point of f1_macro, within a corpus and "
        "across (docs/model.md).",
        "function",
    )
    branches: int = setting(
        2,
        "Different interventions drawn per clip and step, at most as many as have a probability above 0.",
        "function",
        at_least(0),
    )
    structure_probability: float = setting(
        1.0,
        "Relative chance of this intervention among those that a clip can draw; 0 leaves it out. The same holds for "
        "`appearance_probability` and `neutral_probability`.",
        "function",
        share(),
    )
    structure_weight: float = setting(0.5, "Weight of the structure intervention's loss.", "function", at_least(0))
    structure_edges: float = setting(
        0.15,
        "Largest share of the prior's edges that one structure intervention cuts or rewires.",
        "function",
        share(),
    )
    appearance_probability: float = setting(
        1.0, "Relative chance of the appearance intervention; 0 leaves it out.", "function", share()
    )
    appearance_weight: float = setting(0.5, "Weight of the appearance intervention's loss.", "function", at_least(0))
    neutral_probability: float = setting(
        1.0, "Relative chance of the neutral intervention; 0 leaves it out.", "function", share()
    )
    neutral_weight: float = setting(0.5, "Weight of the neutral intervention's loss.", "function", at_least(0))
    contradiction_weight: float = setting(
        0.5,
        "Weight of the crossed pairs that make the LLM use both tokens; 0 leaves them out. They accompany the neutral "
        "intervention and need the graph; a run says at its start whether they are on.",
        "function",
        at_least(0),
    )
    contradiction_margin: float = setting(
        0.1,
        "Probability by which a structure must count more on matching than on neutral evidence.",
        "function",
        share(),
    )
