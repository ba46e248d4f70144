"""Switches off what libraries print by themselves: progress bars, and messages at an import."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden_progress_bars(hide: bool = True) -> Iterator[None]:
    """Hide transformers' progress bars inside the block, if `hide`; a bar that was off before stays off."""
    from transformers.utils import logging as transformers_logging

    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


@contextmanager
def hidden_gguf_bar() -> Iterator[None]:
    """Hide the bar of transformers' GGUF reader inside the block; it comes from tqdm itself, which nobody can ask."""
    import functools

    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


@contextmanager
def hidden_reports(hide: bool = True) -> Iterator[None]:
    """Hide transformers' warnings inside the block, if `hide`: its list of weights that it does not use, for one."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    if hide:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def hide_missing_cpu_kernel() -> None:
    """Hide bitsandbytes' complaint, at its import, that one kernel for CPUs with AVX512-BF16 is not installed.

    It is for the CPU layout that `llm.quantization` switches off, so nothing is lost without it. Importing PEFT
    imports bitsandbytes, so this must run before either; other messages of the same logger pass.
    """
    # One function object: a logger takes the same filter only once.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_the_kernel)


def _is_not_about_the_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def hide_matplotlib_cache() -> None:
    """Hide what matplotlib says, at its import, of a cache that it cannot write: it takes a temporary one.

    This must run before the import; other messages of the same logger pass.
    """
    logging.getLogger("matplotlib").addFilter(_is_not_about_the_cache)
    logging.getLogger("matplotlib.font_manager").addFilter(_is_not_about_the_cache)


def _is_not_about_the_cache(record: logging.LogRecord) -> bool:
    about = ("mkdir -p failed", "Matplotlib created a temporary", "Matplotlib is building the font cache")
    return not str(record.msg).startswith(about)


def name_deepspeed_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none; otherwise it finds out with a warning at its import.

    transformers imports DeepSpeed to save a model, so this is wanted without any engine of it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
