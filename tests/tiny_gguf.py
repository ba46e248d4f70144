"""A tiny Llama as a GGUF file, written with gguf's own writer: what a conversion tool would leave of one."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

WIDTH, HEADS, LAYERS, MLP = 64, 2, 2, 96
WORDS = [*(chr(code) for code in range(33, 127)), "\u0120", "\u010a", "ab", "<s>", "</s>"]
"""Bytes as byte-level vocabularies write them, one merge and two special tokens."""


def write_gguf(file: Path, *, without: str = "", extra: tuple[str, ...] = (), **fields: str) -> dict[str, np.ndarray]:
    """Write the file, linear layers in Q8_0; return its tensors before that.

    Args:
        file: where it goes.
        without: tensor that is left out.
        extra: more tensors, by name.
        fields: more entries of the header, `_` for `.`; a value of digits is a number.
    """
    writer = GGUFWriter(file, fields.pop("architecture", "llama"))
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    for name, value in fields.items():
        if value.isdigit():
            writer.add_uint16(name.replace("_", "."), int(value))
        else:
            writer.add_string(name.replace("_", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(WORDS) - 2)
    writer.add_eos_token_id(len(WORDS) - 1)
    tensors = _tensors() | {name: np.ones(WIDTH // HEADS // 2, np.float32) for name in extra}
    tensors.pop(without, None)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        parts = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH)}
        parts |= {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")} | {"ffn_down": (WIDTH, MLP)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
