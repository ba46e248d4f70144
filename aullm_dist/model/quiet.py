"""The one place that switches off what libraries print by themselves: progress bars, and messages at an import."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


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


def hide_missing_cpu_kernel() -> None:
    """Hide bitsandbytes' complaint, at its import, that one kernel for CPUs with AVX512-BF16 is not installed.

    It is for the CPU layout that `model.quantization` switches off, so nothing is lost without it. Importing PEFT
    imports bitsandbytes, so this must run before either; other messages of the same logger pass.
    """
    # One function object: a logger takes the same filter only once.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_the_kernel)


def _is_not_about_the_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def name_deepspeed_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none; otherwise it finds out with a warning at its import.

    transformers imports DeepSpeed to save a model, so this is wanted without any engine of it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
