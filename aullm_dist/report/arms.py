"""Finds which arm of an ablation a run is, from what its configuration leaves out, never from its folder's name."""

from dataclasses import dataclass

from aullm_dist.config import Config, different_settings, llm_only, may_differ, to_dict
from aullm_dist.config.schema import settings
from aullm_dist.model.counterfactual import branching


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
        answer: how the answer is made; `-` without an LLM.
        network: the network without an LLM; None with one.
        visual: what is seen of a clip; `-` where the network decides that.
        neutral_clips: whether some training clips are seen without their movement.
    """

    llm: bool = True
    evidence: str = "full"
    structure: bool = True
    interventions: tuple[str, ...] = ()
    branches: int = 0
    crossed: bool = False
    answer: str = "stages"
    network: str | None = None
    visual: str = "flow"
    neutral_clips: bool = True


FULL = Arm()
NAMES: dict[Arm, str] = {
    FULL: "full model",
    Arm(interventions=("structure", "appearance", "neutral"), branches=2, crossed=True): "with CCR",
    Arm(interventions=("structure",), branches=1): "with CCR: structure alone",
    Arm(interventions=("appearance",), branches=1): "with CCR: appearance alone",
    Arm(interventions=("neutral",), branches=1): "with CCR: neutral alone",
    Arm(structure=False): "no instruction token",
    Arm(evidence="high_only"): "content token without mid level",
    Arm(evidence="no_attention"): "no evidence attention",
    Arm(answer="deduction"): "answer of the LLM's head alone",
    Arm(neutral_clips=False): "no neutral clips",
    Arm(visual="led"): "LED in place of flow",
    Arm(visual="both"): "LED in addition to flow",
    Arm(llm=False, evidence="full", structure=False, answer="-", network="evidence"): "no LLM (evidence)",
    **{
        Arm(llm=False, evidence="-", structure=False, answer="-", network=name, visual="-"): f"no LLM ({name})"
        for name in ("led_cnn", "led_sssnet", "sssnet_of")
    },
}
"""The arms of `configs/experiments/ablation`, in the order of the tables."""


def arm_of(config: Config) -> Arm:
    """Return the arm that a configuration trains."""
    llm = config.model.llm != "none"
    structure = llm and config.model.structure
    chances, crossed = branching(config, has_graph=structure)
    interventions = chances.names if chances.branches else ()
    network = None if llm else config.model.network
    sees = llm or network == "evidence"
    return Arm(
        llm=llm,
        evidence=config.model.evidence if sees else "-",
        structure=structure,
        interventions=interventions,
        branches=min(chances.branches, len(interventions)),
        crossed=crossed,
        answer=config.model.answer if llm else "-",
        network=network,
        visual=config.model.visual if sees else "-",
        neutral_clips=config.data.neutral_share > 0,
    )


def name_of(arm: Arm) -> str:
    """Return an arm's name in the tables; one that is not shipped is described."""
    if arm in NAMES:
        return NAMES[arm]
    parts = [f"evidence {arm.evidence}" if arm.llm else f"no LLM ({arm.network})"]
    parts += [] if arm.visual in ("flow", "-") else [f"visual {arm.visual}"]
    parts += ["answer of the deduction alone"] if arm.answer == "deduction" else []
    parts += [] if arm.structure or not arm.llm else ["no instruction token"]
    parts += [f"CCR {arm.branches} of {'+'.join(arm.interventions)}"] if arm.branches else []
    parts += ["crossed pairs"] if arm.crossed else []
    parts += [] if arm.neutral_clips else ["no neutral clips"]
    return ", ".join(parts)


def other_differences(full: Config, arm: Config) -> list[str]:
    """Return the settings, such as `training.epochs`, that differ between two runs and make no arm."""
    one, two = (_compared(config) for config in (full, arm))
    # What one of them draws nothing of, or has no part for, has no meaning there.
    names = [name for name in different_settings(to_dict(full), to_dict(arm)) if name in one & two]
    if "none" in (full.model.llm, arm.model.llm):
        without_use = llm_only()
        names = [name for name in names if name not in without_use]
    return names


def _compared(config: Config) -> set[str]:
    arm = arm_of(config)
    used = {
        f"counterfactual.{key}"
        for key in to_dict(config)["counterfactual"]
        if key.partition("_")[0] in (*arm.interventions, *(["contradiction"] if arm.crossed else []))
    }
    # What makes an arm, where a run lies, how it is computed: all else must be equal, or a difference is not the arm's.
    free = may_differ("ablation")
    names = (setting.name for setting in settings())
    return {name for name in names if name not in free and (name in used or not name.startswith("counterfactual."))}
