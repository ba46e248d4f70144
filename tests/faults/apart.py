"""Work in a forked process, for a driver that must compute nothing itself: then it can be forked again."""

import multiprocessing
from collections.abc import Callable


def apart(work: Callable[..., None], *arguments: object) -> None:
    """Call a function in a forked process and wait for it.

    Raises:
        AssertionError: it failed; its traceback is on stderr.
    """
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{work.__name__} ended with {process.exitcode}"
