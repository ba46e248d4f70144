"""Reads the LoRA adapter of a checkpoint layer by layer, as deltas of weights, and refuses one that is more."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aullm_dist.checkpoint.store import ADAPTER_CONFIG_FILE
from aullm_dist.checkpoint.tensor_plan import ADAPTER_FILE
from aullm_dist.errors import UserError
from aullm_dist.files import read_json
from aullm_dist.llm.stored.weight_files import WeightFiles

_WRAPPER = "base_model.model."
_PARTS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_magnitude_vector": "magnitude"}
_MUST_BE_OFF = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
FEWEST_ROWS = 8
"""Rows of a product that is computed in parts, at least."""
# The others change the base's own weights before training.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Delta:
    """What LoRA adds to one weight: `up @ down * scaling`, and with DoRA a new norm for each of its rows."""

    module: str
    down: str
    """Key of A `[r, in]` in the adapter's file."""
    up: str
    """Key of B `[out, r]`."""
    magnitude: str | None
    """Key of DoRA's norms `[out]`."""
    scaling: float
    shape: tuple[int, int]
    rank: int

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the adapter's file that it takes."""
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in float32."""
        return 4 * (self.rank * sum(self.shape) + self.shape[0])


@dataclass(frozen=True, slots=True)
class Factors:
    """The tensors of a `Delta` in float32, the scaling in `up` if no bit of the product depends on it."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    scaling: float | None
    """What is left to multiply the product with."""


class Adapter:
    """The adapter of a checkpoint.

    Args:
        checkpoint: a checkpoint folder whose files are intact.

    Attributes:
        deltas: by the name of the layer on the plain LLM.

    Raises:
        UserError: there is none, it is no plain LoRA, or a tensor is missing or left over.
    """

    def __init__(self, checkpoint: Path) -> None:
        path = checkpoint / ADAPTER_CONFIG_FILE
        if not path.is_file():
            raise UserError(
                f"{checkpoint}: holds no LoRA adapter; allowed: a checkpoint of a run with model.lora_rank > 0"
            )
        self._config = read_json(path)
        _refuse_special(path, self._config)
        self.path = checkpoint / ADAPTER_FILE
        self.files = WeightFiles(checkpoint, ADAPTER_FILE)
        self.deltas = self._deltas()

    def read(self, delta: Delta) -> Factors:
        """Return the tensors of a delta."""
        down, up = (self.files.read(key).view(self.files[key].shape).float() for key in (delta.down, delta.up))
        magnitude = None if delta.magnitude is None else self.files.read(delta.magnitude).float()
        mantissa, _ = math.frexp(delta.scaling)
        if abs(mantissa) == 0.5:  # a power of two changes exponents alone
            return Factors(down, up * delta.scaling, magnitude, None)
        return Factors(down, up, magnitude, delta.scaling)

    def close(self) -> None:
        """Close its file."""
        self.files.close()

    def _deltas(self) -> dict[str, Delta]:
        parts: dict[str, dict[str, str]] = {}
        for key in self.files.tensors:
            suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
            if suffix is None or not key.startswith(_WRAPPER):
                raise UserError(f"{self.path}: {key} is no tensor of a LoRA on linear layers, and would be left over")
            module = key.removeprefix(_WRAPPER).removesuffix(suffix)
            parts.setdefault(module, {})[_PARTS[suffix]] = key
        return {module: self._delta(module, keys) for module, keys in parts.items()}

    def _delta(self, module: str, keys: dict[str, str]) -> Delta:
        wanted = {"down", "up", "magnitude"} if self._config.get("use_dora") else {"down", "up"}
        if keys.keys() != wanted:
            names = {part: suffix for suffix, part in _PARTS.items()}
            odd = ", ".join(f"{module}{names[part]}" for part in sorted(keys.keys() ^ wanted))
            raise UserError(f"{self.path}: {odd} is missing or left over; allowed: a complete adapter")
        down, up = (self.files[keys[part]].shape for part in ("down", "up"))
        rank, scaling = _rank_and_scaling(self._config, module)
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise UserError(
                f"{self.path}: {module} has LoRA shapes {down} and {up}, adapter_config.json says rank {rank}"
            )
        magnitude = keys.get("magnitude")
        if magnitude is not None and self.files[magnitude].numel != up[0]:
            raise UserError(f"{self.path}: {magnitude} has shape {self.files[magnitude].shape}; allowed: ({up[0]},)")
        return Delta(module, keys["down"], keys["up"], magnitude, scaling, (up[0], down[1]), rank)


def _refuse_special(path: Path, config: dict[str, Any]) -> None:
    problem = next((key for key in _MUST_BE_OFF if config.get(key)), None)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; allowed: LORA")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {config['bias']!r}; allowed: none")
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise UserError(f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base itself")
    if problem:
        raise UserError(f"{path}: {problem} is {config[problem]!r}, which cannot be merged; allowed: off")


def _rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    def own(key: str, pattern: str) -> float:
        values: dict[str, float] = config.get(pattern) or {}
        return values.get(get_pattern_key(list(values), module), config[key])

    rank, alpha = int(own("r", "rank_pattern")), own("lora_alpha", "alpha_pattern")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merge_rows(weight: Tensor, factors: Factors, first: int, product: Tensor) -> Tensor:
    """Add LoRA's part to consecutive rows of a weight, in place, and return them.

    Bit for bit what PEFT makes of them in float32.

    Args:
        weight: rows from `first` on, float32 `[n, in]`.
        factors: of the whole weight.
        first: number of the first row.
        product: float32 `[at least max(n, FEWEST_ROWS), in]`, to be overwritten.
    """
    rows = slice(first, first + len(weight))
    # Products of one or two rows are summed in another order than those of the whole weight: take rows before along.
    begin = max(0, min(first, rows.stop - FEWEST_ROWS))
    product = torch.mm(factors.up[begin : rows.stop], factors.down, out=product[: rows.stop - begin])[first - begin :]
    if factors.scaling is not None:
        product.mul_(factors.scaling)
    weight.add_(product)
    if factors.magnitude is not None:
        weight.mul_((factors.magnitude[rows] / torch.linalg.norm(weight, dim=1)).view(-1, 1))
    return weight
