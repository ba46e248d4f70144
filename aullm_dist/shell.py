"""Quotes commands that are printed for a user to run, so that a path with a blank stays one word."""

import shlex


def command(*words: object) -> str:
    """Return words as a line that a shell reads as these words."""
    return shlex.join(map(str, words))
