"""The one place that switches off a library's own progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def hidden_progress_bars(hide: bool = True) -> Iterator[None]:
    """Hide transformers' progress bars inside the block, if `hide`; a bar that was off before stays off."""
    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
