"""Wraps networks without an LLM for the trainer: shipped ones by name, a user's own by its import path.

A network of a user's own is a class `package.module:Class` that derives from `torch.nn.Module`. It is made as
`Class(num_aus=A, num_frames=T, image_size=S)`, and its `forward` takes views `[V, C, H, W]` float32 and returns logits
`[V, A]`. Its attribute `stream` says what the views are: `led` (the default) gray clips in 0..1 with C = T, `flow` flow
maps with C = 2 (T - 1), `both`, or `onset_apex` images `[V, 3, 64, 64]`. A method `summary(views) -> [V, F]` is
optional; pictures of the feature space show it.
"""

import difflib
import importlib
import inspect
from typing import get_args

import torch
from torch import Tensor, nn

from aullm_dist.config import Config
from aullm_dist.data.views import Stream, view_shape
from aullm_dist.errors import UserError
from aullm_dist.model.aullm import Ablation, Explanation, ModelOutput, mixed_precision
from aullm_dist.model.baselines import EvidenceBaseline, LedSssNet, SssNetOf
from aullm_dist.model.projector import EvidenceJoin
from aullm_dist.model.visual import LedCnn, VisualBackbone


class NetworkAlone(nn.Module):
    """A network without an LLM behind the call of `AULLM`.

    Args:
        network: views `[V, C, H, W]` -> logits `[V, A]`.
        autocast: dtype of mixed precision, None for none.
    """

    adapter_prefix = ""
    graph = None

    def __init__(self, network: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.network = network

    @property
    def stream(self) -> Stream:
        """What the views hold."""
        return stream_of(self.network)

    def peft_model(self) -> None:
        """There is no LLM, hence no adapter."""
        return None

    def forward(
        self,
        views: Tensor,
        view_index: Tensor,
        edge_mask: Tensor | None,
        branches: Tensor,
        ablate: Ablation | None = None,
    ) -> ModelOutput:
        """Answer every branch from its view alone; arguments as in `AULLM.forward`."""
        with mixed_precision(views.device, self.autocast):
            return ModelOutput(self.network(views)[branches[:, 0]].float())

    def explain(self, views: Tensor, edge_mask: Tensor | None = None) -> Explanation:
        """Answer each clip and return its summary vector, or its logits where the network has none."""
        with mixed_precision(views.device, self.autocast), torch.no_grad():
            logits = self.network(views).float()
            summary = getattr(self.network, "summary", None)
            return Explanation(logits, logits if summary is None else summary(views).float())


def stream_of(network: nn.Module | type[nn.Module]) -> Stream:
    """Return what a network's views hold; gray clips where it does not say."""
    return getattr(network, "stream", "led")


def build_network(config: Config, num_aus: int) -> nn.Module:
    """Build the network of a run without an LLM (`model.network`).

    Args:
        config: the run's configuration.
        num_aus: A.

    Raises:
        UserError: a network of the user's own cannot be imported or made, or takes or gives other shapes.
    """
    data, model = config.data, config.model
    sizes = (data.num_frames, data.size)
    if model.network == "led_cnn":
        return LedCnn(num_aus, *sizes, dropout=model.dropout)
    if model.network == "led_sssnet":
        return LedSssNet(num_aus, *sizes)
    if model.network == "sssnet_of":
        return SssNetOf(num_aus)
    if model.network == "evidence":
        visual = VisualBackbone(*sizes, dropout=model.dropout, visual=model.visual)
        join = EvidenceJoin(
            visual.cell_dim,
            visual.feature_dim,
            cell_grid=visual.cell_grid,
            heads=model.evidence_heads,
            evidence=model.evidence,
            dropout=model.dropout,
            implementation=model.kernels,
        )
        return EvidenceBaseline(visual, join, num_aus)
    return _own_network(model.network, num_aus, *sizes)


def _own_network(name: str, num_aus: int, num_frames: int, image_size: int) -> nn.Module:
    kind = _own_class(name)
    arguments = {"num_aus": num_aus, "num_frames": num_frames, "image_size": image_size}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"model.network: {name} cannot be made of num_aus, num_frames and image_size ({error}); its __init__ must "
            "take these three by name"
        ) from None
    network = kind(**arguments)
    stream = stream_of(network)
    if stream not in get_args(Stream):
        raise UserError(f"model.network: {name}.stream is {stream!r}; allowed: {', '.join(get_args(Stream))}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"model.network: {name} has no parameter to train")
    _try(name, network, view_shape(stream, num_frames, image_size), num_aus)
    return network


def _own_class(name: str) -> type[nn.Module]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"model.network: {module_name} cannot be imported ({error}); put its folder on PYTHONPATH or install it"
        ) from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        kinds = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        close = difflib.get_close_matches(class_name, kinds, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"model.network: {module_name} has no torch.nn.Module {class_name}{hint}")
    return found


def _try(name: str, network: nn.Module, shape: tuple[int, int, int], num_aus: int) -> None:
    """Answer two empty clips, so that wrong shapes are found before a corpus is read to its end."""
    was_training = network.training
    network.eval()
    says = ", ".join(map(str, shape))
    try:
        with torch.no_grad():
            given = network(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"model.network: {name} does not take views [V, {says}] ({reason[0] if reason else type(error).__name__})"
        ) from None
    network.train(was_training)
    found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if found != [2, num_aus] or not given.is_floating_point():
        raise UserError(
            f"model.network: {name} answers views [2, {says}] with {found}; allowed: floating-point logits "
            f"[2, {num_aus}], one for each clip and AU"
        )
