"""Builds the run's model shape-only: the trainer's own modules, on tensors with shapes and dtypes but no storage.

Nothing is counted by formulas that could go stale: parameters are those of the modules that the trainer builds, and
forward and backward passes run on `FakeTensor`s, which know the size of everything that would be allocated.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from aullm_dist.config import Config
from aullm_dist.data.views import view_channels
from aullm_dist.llm.backbone import Backbone, choose_attention
from aullm_dist.llm.experts import packed_shape, put_packed_experts
from aullm_dist.llm.layers import checkpoint_activations, decoder_layers
from aullm_dist.llm.lora import add_lora, lora_targets_of
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.quantization import is_packed, nf4_config, prepare, valueless_state
from aullm_dist.model.assembly import assemble
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.prompt import Prompt, Readout
from aullm_dist.model.relations import build_relations
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.implementations import LIBRARY_NAMES


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One parameter of the model, as it is stored.

    Attributes:
        name: in the model.
        owner: name of the module that ZeRO-3 gathers it with: a decoder layer, or the module that holds it.
        in_layer: whether that is a decoder layer.
        numel: stored elements; a packed weight has four weights in one bfloat16 element.
        itemsize: bytes of an element.
        weights: weights that it stands for.
        constants: bytes of its quantisation constants, 0 if it is not packed.
        trainable: whether it is trained.
    """

    name: str
    owner: str
    in_layer: bool
    numel: int
    itemsize: int
    weights: int
    constants: int
    trainable: bool

    @property
    def nbytes(self) -> int:
        """Bytes without the constants."""
        return self.numel * self.itemsize


def prompt_of_size(aus: tuple[int, ...], prefix: int, suffix: int, readout: Readout, use_structure: bool) -> Prompt:
    """Return a prompt of which only the lengths mean anything: P prefix tokens, S suffix tokens.

    Args:
        aus: AU numbers.
        prefix: P.
        suffix: S, soft tokens and markers included.
        readout: as in the run file.
        use_structure: whether there is an instruction token.
    """
    soft = 1 + use_structure + (len(aus) if readout == "per_au" else 0)
    words = max(suffix - soft, 0)
    structure = min(2, words - 1) if use_structure and words > 1 else 0
    return Prompt(
        aus=aus,
        readout=readout,
        text="",
        prefix_ids=(0,) * prefix,
        structure_ids=(0,) * structure,
        question_ids=(0,) * (words - structure),
        name_ids=((0,),) * len(aus),
        use_structure=use_structure,
    )


def build(config: Config, llm: PretrainedConfig, prompt: Prompt, in_pieces: bool) -> AULLM:
    """Return the run's model in its initial state, with its LLM on the meta device.

    Args:
        config: the run's configuration.
        llm: config of its LLM.
        prompt: of the right lengths.
        in_pieces: whether the LLM is loaded in pieces, without its vocabulary head, or whole by the library.

    Raises:
        UserError: sizes, attention, LoRA targets or quantisation that cannot work with this LLM.
    """
    model = config.model
    dtype = compute_dtype(config)
    # Flex attention is compiled for the GPU it runs on; like prefix attention it keeps no scores.
    attention, _ = choose_attention(llm, "prefix" if model.attention == "flex" else model.attention, model.packing)
    options = {"attn_implementation": LIBRARY_NAMES.get(attention, attention)}
    packing = None if model.quantization == "none" else nf4_config(dtype)
    causal_lm = model_without_storage(llm, dtype, packing, options=options, keep_head=not in_pieces)
    if model.quantization == "nf4_experts":
        put_packed_experts(causal_lm)
    causal_lm.requires_grad_(False)
    causal_lm.config.use_cache = False
    wanted = model.lora_targets[0] if model.lora_targets == ("all-linear",) else model.lora_targets
    targets = lora_targets_of(causal_lm, wanted)
    with _NoFirstValues():
        wrapped = add_lora(
            causal_lm, targets, model.lora_rank, model.lora_alpha, model.lora_dropout, config.training.seed
        )
    if model.activation_checkpointing != "none":
        checkpoint_activations(causal_lm, reentrant=model.activation_checkpointing == "reentrant")
    decoder: Any = decoder_of(causal_lm)
    width = int(decoder.config.hidden_size)
    backbone = Backbone(model=wrapped, tokenizer=None, config=llm, hidden_size=width, quantized_modules=(), reasons={})
    relations = build_relations(prompt.aus) if model.structure else None
    # The implementation that runs on shapes alone.
    config = dataclasses.replace(config, model=dataclasses.replace(model, kernels="torch"))
    with torch.random.fork_rng(devices=[]), _NoFirstValues():
        return assemble(config, backbone, prompt, relations, scale=1.0, names=torch.ones(len(prompt.aus), width))


class _NoFirstValues(TorchFunctionMode):
    """Leaves parameters as they are allocated: those of a LoRA alone may be GBs, which nobody would look at."""

    _DRAWN = frozenset((Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._DRAWN and isinstance(args[0], nn.Parameter):
            return args[0]
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def weights_of(network: nn.Module, config: Config) -> list[Weight]:
    """Return every parameter once, in the order of the forward pass."""
    dtype = compute_dtype(config)
    packing = nf4_config(dtype)
    layer_of = {f"{layer}.{inner}".removesuffix("."): layer for layer, inner in _modules_of_layers(network)}
    found = []
    module: Any
    for name, attribute, module in owners(network):
        parameter = getattr(module, attribute)
        owner = name.rpartition(".")[0]
        place = (layer_of.get(owner, owner), owner in layer_of)
        if (shape := packed_shape(module, attribute)) is not None:
            weights = shape.numel()
            itemsize = packing.bnb_4bit_quant_storage.itemsize
            state = valueless_state(shape, torch.bfloat16, "meta")
            constants = sum(t.nbytes for t in (state.absmax, state.state2.absmax))
            found.append(Weight(name, *place, -(-weights // (2 * itemsize)), itemsize, weights, constants, False))
        else:
            itemsize = _dtype_of(parameter, dtype).itemsize
            numel = parameter.numel()
            found.append(Weight(name, *place, numel, itemsize, numel, 0, parameter.requires_grad))
    return found


def _modules_of_layers(network: nn.Module) -> Iterator[tuple[str, str]]:
    for layer, module in decoder_layers(network):
        yield from ((layer, inner) for inner, _ in module.named_modules())


@contextlib.contextmanager
def valueless(network: AULLM, config: Config) -> Iterator[FakeTensorMode]:
    """Give every parameter and buffer a place on a CPU that allocates nothing, and yield the mode to compute in."""
    dtype = compute_dtype(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for _, name, module in list(owners(network)):
            given = getattr(module, name)
            if is_packed(module, name):
                _put_packed(module, dtype)
            else:
                made = torch.empty(given.shape, dtype=_dtype_of(given, dtype))
                module.register_parameter(name, nn.Parameter(made, requires_grad=given.requires_grad))
        for module in network.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if config.model.quantization != "none":
            llm: Any = network.reasoner.llm
            prepare(llm.get_base_model(), dtype)
        yield mode


def compute_dtype(config: Config) -> torch.dtype:
    """Return the dtype of what is frozen and not packed, and of products with what is packed."""
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def _dtype_of(parameter: nn.Parameter, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype once it is loaded: with packed weights the library first makes float32 biases."""
    return parameter.dtype if parameter.requires_grad else dtype


def _put_packed(module: Any, dtype: torch.dtype) -> None:
    storage = nf4_config(dtype).bnb_4bit_quant_storage
    shape = torch.Size((module.out_features, module.in_features))
    numel = -(-shape.numel() // (2 * storage.itemsize))
    # A plain parameter: bitsandbytes' own class cannot hold such a tensor, and its layer does not ask for it.
    parameter = nn.Parameter(torch.empty(numel, 1, dtype=storage), requires_grad=False)
    module.quant_state = valueless_state(shape, dtype, "cpu")
    module.register_parameter("weight", parameter)
    setattr(parameter, "quant_state", module.quant_state)  # noqa: B010 - an attribute that only bitsandbytes knows


def batch_of(config: Config, edges: int, views: int, structures: int, branches: int) -> tuple[Tensor | None, ...]:
    """Return the arguments of the model for a micro-batch of these sizes; called in the mode of `valueless`."""
    data = config.data
    mask = torch.ones(structures, edges, dtype=torch.bool) if edges else None
    return (
        torch.zeros(views, view_channels(config.model.visual, data.num_frames), data.size, data.size),
        torch.zeros(structures, dtype=torch.int64),
        mask,
        torch.zeros(branches, 2, dtype=torch.int64),
    )
