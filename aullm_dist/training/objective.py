"""Computes the objective of one micro-batch: ASL, auxiliary graph loss and the terms of CCR, each kept for the log."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aullm_dist.config import Config
from aullm_dist.model.aullm import ModelOutput
from aullm_dist.model.losses import AsymmetricLoss, consistency, contradiction
from aullm_dist.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """Weights and forms of the loss.

    Every term is the sum over the clips that drew it divided by all clips of the micro-batch, so that the gradient of a
    global batch does not depend on how it is cut into micro-batches and processes. An intervention that half of the
    clips draw therefore counts half.
    """

    asymmetric: AsymmetricLoss
    evidence_weight: float
    graph_weight: float
    structure_weight: float
    appearance_weight: float
    neutral_weight: float
    contradiction_weight: float
    contradiction_margin: float

    @classmethod
    def from_config(cls, config: Config) -> "Objective":
        """Take the weights from a run's configuration."""
        training, counterfactual = config.training, config.counterfactual
        return cls(
            asymmetric=AsymmetricLoss(
                gamma_negative=training.asl_gamma_negative,
                gamma_positive=training.asl_gamma_positive,
                margin=training.asl_margin,
            ),
            evidence_weight=training.evidence_weight,
            graph_weight=training.graph_weight,
            structure_weight=counterfactual.structure_weight,
            appearance_weight=counterfactual.appearance_weight,
            neutral_weight=counterfactual.neutral_weight,
            contradiction_weight=counterfactual.contradiction_weight,
            contradiction_margin=counterfactual.contradiction_margin,
        )

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch and, per component, `[2]` = (sum over clips, number of clips)."""
        terms = dict(self._terms(output, batch))
        clips = len(batch.sample_ids)
        loss = torch.stack([weight * values.sum() / clips for weight, values in terms.values()]).sum()
        log = {name: _sum_and_count(values) for name, (_, values) in terms.items()}
        log["loss"] = torch.stack([loss.detach() * clips, loss.new_full((), clips)])
        return loss, log

    def _terms(self, output: ModelOutput, batch: Batch) -> list[tuple[str, tuple[float, Tensor]]]:
        factual = output.logits[batch.rows["factual"][0]]
        terms = [("asl", (1.0, self.asymmetric(factual, batch.labels)))]
        terms += self._stages(output, batch)
        for kind, weight in (("structure", self.structure_weight), ("appearance", self.appearance_weight)):
            if kind in batch.rows:
                rows, clips = batch.rows[kind]
                terms.append((kind, (weight, consistency(output.logits[rows], factual[clips]))))
        if "neutral" in batch.rows:
            rows, clips = batch.rows["neutral"]
            neutral = output.logits[rows]
            terms.append(("neutral", (self.neutral_weight, self.asymmetric(neutral, torch.zeros_like(neutral)))))
            if "evidence_only" in batch.rows:
                structure_only = output.logits[batch.rows["structure_only"][0]]
                hinge = contradiction(
                    matching=factual[clips],
                    evidence_only=output.logits[batch.rows["evidence_only"][0]],
                    structure_only=structure_only,
                    neither=neutral,
                    labels=batch.labels[clips],
                    margin=self.contradiction_margin,
                )
                # Whatever the structure says, evidence without movement shows no AU: this answer is known as well.
                unsupported = self.asymmetric(structure_only, torch.zeros_like(structure_only))
                terms.append(("contradiction", (self.contradiction_weight, hinge + unsupported)))
        return terms

    def _stages(self, output: ModelOutput, batch: Batch) -> list[tuple[str, tuple[float, Tensor]]]:
        """Return the losses on the answers of single stages to the factual clips."""
        terms, before = [], None
        if output.evidence_logits is not None:
            before = output.evidence_logits[batch.branches[batch.rows["factual"][0], 0]]
            terms.append(("evidence", (self.evidence_weight, self.asymmetric(before, batch.labels))))
        if output.graph_logits is not None:
            graph = output.graph_logits[batch.factual_structures]
            # What the graph adds must be an answer of its own: on training clips the evidence leaves over next to
            # nothing, and what learnt from that alone would not use the instruction token.
            own = graph if before is None else graph - before
            terms.append(("graph", (self.graph_weight, self.asymmetric(own, batch.labels))))
        return [term for term in terms if term[1][0]]


def _sum_and_count(values: Tensor) -> Tensor:
    # Filled on the device: a tensor made of a number would be copied there, and the host would wait for that.
    return torch.stack([values.detach().sum(), values.new_full((), values.numel())])
