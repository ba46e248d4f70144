"""Which arm of an ablation a run is: read from what its configuration leaves out, never from the name of its folder."""

from dataclasses import dataclass
from typing import Any

from aullm_dist.config import Config, to_dict
from aullm_dist.model.counterfactual import branching
from aullm_dist.training.predict import CHANGEABLE


@dataclass(frozen=True, slots=True)
class Arm:
    """What a run trains, as far as an ablation changes it.

    Attributes:
        llm: whether there is an LLM.
        evidence: what the content token is made of; `-` without an LLM.
        structure: whether there is an AU graph with its instruction token.
        interventions: those that a clip can draw.
        branches: how many different ones it draws.
        crossed: whether neutral twins are crossed with their clips.
    """

    llm: bool = True
    evidence: str = "full"
    structure: bool = True
    interventions: tuple[str, ...] = ("structure", "appearance", "neutral")
    branches: int = 2
    crossed: bool = True


FULL = Arm()
NAMES: dict[Arm, str] = {
    FULL: "full model",
    Arm(interventions=(), branches=0, crossed=False): "no CCR",
    Arm(interventions=("structure",), branches=1, crossed=False): "CCR: structure alone",
    Arm(interventions=("appearance",), branches=1, crossed=False): "CCR: appearance alone",
    Arm(interventions=("neutral",), branches=1, crossed=False): "CCR: neutral alone",
    Arm(structure=False, interventions=("appearance", "neutral"), crossed=False): "no instruction token",
    Arm(evidence="high_only"): "content token without mid level",
    Arm(evidence="no_attention"): "no evidence attention",
    Arm(False, "-", False, ("appearance", "neutral"), 2, False): "no LLM (led_cnn)",
}
"""The arms of `configs/experiments/ablation`, in the order of the tables."""

# What makes an arm, where a run lies, and how it is computed: all else must be equal for a difference to be the arm's.
_FREE = {
    *CHANGEABLE, "model.architecture", "model.evidence", "model.structure", "training.output", "training.check_memory",
    "training.keep_checkpoints", "training.save_every_steps", "training.verify", "training.grace_seconds",
    "training.max_failures", "training.baseline", "data.workers", "data.fold",
} - {"model.llm"}  # fmt: skip
_OF_THE_LLM = ("model.l", "model.graph", "model.evidence_heads", "model.readout", "model.quantization",
               "model.activation_checkpointing", "model.training_statistics")  # fmt: skip
"""Starts of the names of settings that a model without an LLM has no use for."""


def arm_of(config: Config) -> Arm:
    """Return the arm that a configuration trains."""
    llm = config.model.llm != "none"
    structure = llm and config.model.structure
    chances, crossed = branching(config, has_graph=structure)
    interventions = chances.names if chances.branches else ()
    evidence = config.model.evidence if llm else "-"
    return Arm(llm, evidence, structure, interventions, min(chances.branches, len(interventions)), crossed)


def name_of(arm: Arm) -> str:
    """Return an arm's name in the tables; one that is not shipped is described."""
    if arm in NAMES:
        return NAMES[arm]
    parts = [f"evidence {arm.evidence}" if arm.llm else "no LLM"]
    parts += [] if arm.structure or not arm.llm else ["no instruction token"]
    ccr = f"{arm.branches} of {'+'.join(arm.interventions)}" if arm.branches else "none"
    parts += [f"CCR {ccr}", *(["crossed pairs"] if arm.crossed else [])]
    return ", ".join(parts)


def other_differences(full: Config, arm: Config) -> list[str]:
    """Return the settings, such as `training.epochs`, that differ between two runs and make no arm."""
    one, two = (_settings(config) for config in (full, arm))
    # What one of them draws nothing of, or has no part for, has no meaning there.
    names = [name for name in one if name in two and one[name] != two[name]]
    if "none" in (full.model.llm, arm.model.llm):
        names = [name for name in names if not name.startswith(_OF_THE_LLM)]
    return names


def _settings(config: Config) -> dict[str, Any]:
    groups, arm = to_dict(config), arm_of(config)
    flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    used = {
        f"counterfactual.{key}"
        for key in groups["counterfactual"]
        if key.partition("_")[0] in (*arm.interventions, *(["contradiction"] if arm.crossed else []))
    }
    skipped = ("counterfactual.", "monitor.")
    return {name: v for name, v in flat.items() if name not in _FREE and (name in used or not name.startswith(skipped))}
