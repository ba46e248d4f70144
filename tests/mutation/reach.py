"""Records which lines of the mutated packages each test reaches: a pytest plugin around `sys.settrace`.

A fixture that several tests share runs once; what it reaches counts for all of them.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

_CALLS = 40
"""Of one function in one test are traced; further ones cost time and add next to nothing."""
_SECONDS = 2.0
"""After which the rest of a test is not traced."""


class Reach:
    """The plugin: writes {file of tests: {test: {"seconds": CPU time, "lines": {file: lines}}}} after each file."""

    def __init__(self, root: Path, prefixes: tuple[str, ...], out: Path) -> None:
        self._prefixes = tuple(f"{root}/{prefix}" for prefix in prefixes)
        self._root, self._out = f"{root}/", out
        self._found = json.loads(out.read_text()) if out.exists() else {}
        self._ours: dict[str, bool] = {}
        self._lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._tests: dict[str, tuple[float, list[str]]] = {}
        self._failed: set[str] = set()
        self._stack = ["import"]
        self._begun = 0.0
        self._calls: dict[tuple[str, int], int] = defaultdict(int)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        ours = self._ours.get(code.co_filename)
        if ours is None:
            ours = self._ours[code.co_filename] = code.co_filename.startswith(self._prefixes)
        if not ours:
            return None
        key = (self._stack[-1], id(code))  # the hash of a code object reads all of it
        self._calls[key] += 1
        if self._calls[key] > _CALLS:
            if time.process_time() - self._begun > _SECONDS:
                sys.settrace(None)
            return None
        seen = self._lines[self._stack[-1]][code.co_filename]

        def line(frame: FrameType, event: str, argument: object) -> Any:
            seen.add(frame.f_lineno)
            return line

        return line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Trace one test."""
        self._stack = [item.nodeid]
        self._calls.clear()
        definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]  # pytest has no public way
        self._begun = time.process_time()
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            seconds = time.process_time() - self._begun
            self._tests[item.nodeid] = seconds, [_fixture(each[-1]) for each in definitions.values()]
            file = item.nodeid.split("::")[0]
            if nextitem is None or nextitem.nodeid.split("::")[0] != file:
                self._write(file)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[object]:
        """Count what a fixture reaches for all of its tests."""
        self._stack.append(_fixture(fixturedef))
        try:
            return (yield)
        finally:
            self._stack.pop()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Leave out tests that fail, or skip, without a mutant."""
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def _write(self, file: str) -> None:
        entry: dict[str, Any] = {}
        for test, (seconds, fixtures) in self._tests.items():
            if test in self._failed:
                continue
            lines: dict[str, set[int]] = defaultdict(set)
            for context in (test, *fixtures):
                for path, found in self._lines[context].items():
                    lines[path.removeprefix(self._root)] |= found
            sorted_lines = {path: sorted(found) for path, found in lines.items() if found}
            entry[test] = {"seconds": round(seconds, 3), "lines": sorted_lines}
        self._tests.clear()
        self._found[file] = entry
        self._out.write_text(json.dumps(self._found))


def _fixture(definition: Any) -> str:
    return f"fixture {definition.baseid} {definition.argname}"
