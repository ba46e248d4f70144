"""Recognises exceptions of libraries on a user's files, and says in one line what failed and where.

transformers, tokenizers, PEFT and safetensors check little of what they read: a damaged file ends in whatever Python or
Rust raises where it is first used. `refusing` goes around one call of a library, never around code of ours.
"""

import linecache
import re
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from aullm_dist.errors import UserError

LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SafetensorError,
    StopIteration,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the libraries raise for files, sizes or inputs that they were not written for."""

_NO_FAULT_OF_FILES = (torch.OutOfMemoryError, torch.AcceleratorError)
_FOR_USERS = (
    AssertionError,
    ImportError,
    NotImplementedError,
    OSError,
    SafetensorError,
    StrictDataclassError,
    ValueError,
)
"""What libraries raise with words that are meant for whoever calls them."""
_LIBRARIES = ("transformers", "tokenizers", "peft", "safetensors", "huggingface_hub")
_LONGEST = 200
# "Class validation error for validator 'x': ValueError: ..." and "Validation error for field 'x': TypeError: ...".
_VALIDATION = re.compile(r"^(?:Class v|V)alidation error for (?:validator|field) '\w+': (?:\w+Error: )?")


def is_of_library(error: BaseException) -> bool:
    """Return whether an exception is one that the libraries raise for what they were given.

    Rust's side of tokenizers raises a plain `Exception`, and panics with a class that it does not export.
    """
    if isinstance(error, (UserError, *_NO_FAULT_OF_FILES)):
        return False
    return isinstance(error, LIBRARY_ERRORS) or type(error) is Exception or type(error).__name__ == "PanicException"


class refusing:  # noqa: N801 - it reads as a statement, like the context managers of contextlib
    """Turn what a library raises inside the block into a refusal.

    Args:
        tell: makes the refusal of the exception.

    Raises:
        UserError: what `tell` returned. Other exceptions, refusals of ours among them, pass.
    """

    def __init__(self, tell: Callable[[BaseException], UserError]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Refuse what a library raised."""
        if error is not None and is_of_library(error):
            raise self._tell(error) from error


def in_one_line(error: BaseException) -> str:
    """Return what an exception says, in one line of at most 200 characters: whole sentences where there are some.

    Words that a library meant for its callers stay as they are. Python's own ("'NoneType' object is not subscriptable")
    say nothing without the place: the function of the library that failed, and which of its arguments was missing.
    """
    words = _VALIDATION.sub("", " ".join(str(error).split()))
    if type(error) is not Exception and not isinstance(error, (*_FOR_USERS, UserError)):
        words = _with_place(error, words)
    words = words or type(error).__name__
    if len(words) <= _LONGEST:
        return words
    sentence = words[:_LONGEST].rpartition(". ")[0]
    return f"{sentence}." if sentence else f"{words[: _LONGEST - 3]}..."


def _with_place(error: BaseException, words: str) -> str:
    kind = type(error).__name__
    frame, line = _last_library_frame(error.__traceback__)
    if frame is None:
        return f"{kind}: {words}" if words else kind
    where = getattr(frame.f_code, "co_qualname", frame.f_code.co_name).replace(".<locals>", "")
    missing = _absent(frame, line) if "NoneType" in words else []
    if missing:
        return f"{where} needs {' and '.join(missing)}"
    return f"{where} fails with {kind}{f': {words}' if words else ''}"


def _last_library_frame(trace: TracebackType | None) -> tuple[FrameType | None, int]:
    found: tuple[FrameType | None, int] = None, 0
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _LIBRARIES:
            found = trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
    return found


def _absent(frame: FrameType, line: int) -> list[str]:
    """Return the arguments that the failing line of a function uses and that nobody gave."""
    code = frame.f_code
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    used = re.findall(r"[A-Za-z_]\w*", linecache.getline(code.co_filename, line))
    return [name for name in dict.fromkeys(used) if name in given and frame.f_locals.get(name, frame) is None]
