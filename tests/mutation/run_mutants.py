"""Breaks the code in 200 places, one at a time, and counts how many of the breaks the unit tests notice.

    python tests/mutation/run_mutants.py --count 20 --work build/mutants       # a pilot
    python tests/mutation/run_mutants.py --work build/mutants                  # 200; goes on where it was stopped
    python tests/mutation/run_mutants.py --work build/mutants --again survived --tests tests/unit/test_x.py

The tree is copied to WORK/tree, and changed there. A process imports the libraries, and forks one that imports our
modules and collects the unit tests that import a module of the mutated packages. That one forks: first to learn which
test reaches which line (WORK/reach.json), then for each mutant, whose function gets the changed code, to run the tests
that reach it, the module's own and the cheap ones first, until one fails. A mutant of what runs at import has the file
changed in a fork that has not yet imported any of ours.

A mutant is killed when a test fails, when an import fails, or when its tests need 90 s of CPU time or sleep for two
minutes; they take BUDGET seconds at most without it. WORK/results.json has one entry for each mutant.
"""

import argparse
import ast
import collections
import contextlib
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from forks import run_in_fork
from mutants import Mutant, choose

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "evaluation", "data", "checkpoint")
KIN = ("training/optimizer.py", "training/guard.py", "training/step.py")
"""The optimizer's code: groups and schedule, the step, and what keeps a step from being taken."""
PREFIXES = (*(f"aullm_dist/{name}/" for name in PACKAGES), *(f"aullm_dist/{name}" for name in KIN))
_CPU_SECONDS = 90

Tests = dict[str, list[str] | None]
"""Files, each with the tests that are run of it, or all."""


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of a mutant's tests")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--again", nargs="+", default=[], help="states, or beginnings of names, to be run again")
    parser.add_argument("--tests", nargs="+", default=[], help="run all tests of these files, not those that reach")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    tree = options.work / "tree"
    if "MUTANTS_TREE" not in os.environ:  # libraries, and processes that tests start, import ours from the copy
        _copy(tree)
        variables = {
            "MUTANTS_TREE": str(tree), "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }  # fmt: skip
        os.chdir(tree)
        arguments = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--work", str(options.work)]
        os.execve(sys.executable, arguments, {**os.environ, **variables})
    begun = time.monotonic()
    import_libraries()
    run = Run(tree, options)
    run.in_process()
    run.at_import()
    run.say(f"{(time.monotonic() - begun) / 60:.0f} minutes")
    run.summarise()


def _copy(tree: Path) -> None:
    """Bring the copy up to date: files that differ, so that compiled modules of the others stay valid."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    wanted = {name for name in listed if name and (ROOT / name).is_file()}
    for name in wanted:
        source, target = ROOT / name, tree / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for path in tree.rglob("*.py"):
        if str(path.relative_to(tree)) not in wanted:
            path.unlink()


def import_libraries() -> None:
    """Import what our modules and the tests import of others, inside of functions too; a fork then has it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from nursery import _LIBRARIES

    sys.path.pop(0)
    del sys.modules["nursery"]
    own = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"aullm_dist", "aullm_kernels"}
    names = {*_LIBRARIES, "_pytest.assertion.rewrite", "hypothesis", "pytest_timeout"}
    for folder in ("aullm_dist", "kernels/aullm_kernels", "tests/unit"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module)
    for name in sorted(names):
        if name.split(".")[0] not in own:
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module(name)
    ours = [name for name in sys.modules if name.split(".")[0] in ("aullm_dist", "aullm_kernels")]
    assert not ours, f"a library has imported {ours}"
    _ready_to_fork()


def _ready_to_fork() -> None:
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"an import has started {threads - 1} threads; a fork would lose them"
    gc.collect()
    gc.freeze()


class Run:
    """The mutants of one call, and what became of them."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        self.tree, self.options, self.work = tree, options, options.work
        self.failure = options.work / "failure.txt"
        folders = [path for name in PACKAGES for path in sorted((tree / "aullm_dist" / name).rglob("*.py"))]
        paths = [*(str(path.relative_to(tree)) for path in folders), *(f"aullm_dist/{name}" for name in KIN)]
        self.chosen = choose(tree, paths, options.count, options.seed)
        self.started = time.time()
        self.done: set[str] = set()
        self.todo = [mutant for mutant in self.chosen if self._wanted(mutant)]

    @property
    def results(self) -> dict[str, Any]:
        """What is known of each mutant by its name; processes share it as a file."""
        file = self.work / "results.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _wanted(self, mutant: Mutant) -> bool:
        before = self.results.get(mutant.name)
        return before is None or any(
            before["state"] == each or mutant.name.startswith(each) for each in self.options.again
        )

    def say(self, text: str) -> None:
        """Write a line of progress."""
        with (self.work / "progress.txt").open("a") as file:
            file.write(f"{text}\n")

    def in_process(self) -> None:
        """Run the mutants of functions, in forks of a process that has collected the tests."""
        files = self.options.tests or importing(self.tree, PREFIXES)

        def collect() -> int:
            import pytest

            return int(pytest.main([*files, *self._quietly(), "-m", "not launch"], plugins=[_Loop(self)]))

        ended, _ = run_in_fork(collect, self.work / "collect.log", cpu_seconds=36000)
        if ended != "0":
            sys.exit(f"the collecting process ended with {ended}, see collect.log")

    def at_import(self) -> None:
        """Run the others, each with its file changed."""
        import pytest

        self.done |= {name for name, result in self.results.items() if result.get("run") == self.started}
        reach = json.loads((self.work / "reach.json").read_text())
        for mutant in self.todo:
            if mutant.name in self.done:
                continue
            tests = dict.fromkeys(self.options.tests) or tests_of(mutant, reach, self.tree, self.options.budget)

            def test(tests: Tests = tests) -> int:
                return int(pytest.main([*tests, "-x", *self._quietly()], plugins=[_Chosen(tests, self.failure)]))

            path = self.tree / mutant.path
            source = path.read_text()
            with _written(path, mutant.apply(source), source):
                self.judge(mutant, tests, test)

    def judge(self, mutant: Mutant, tests: Tests, body: Callable[[], int]) -> None:
        """Run the tests of a mutant in a fork, and keep what became of it."""
        self.failure.unlink(missing_ok=True)
        ended, seconds = run_in_fork(body, self.work / "mutant.log", _CPU_SECONDS) if tests else ("not reached", 0.0)
        first = self.failure.read_text().splitlines()[:1] if self.failure.exists() else []
        # 1: a test failed, 2: an import failed, 4: the conftest's import failed; others are the tool's own fault.
        state = {"0": "survived", "1": "killed", "2": "killed", "4": "killed"}.get(ended, ended)
        if state == "killed" and not first:
            state = f"unclear {ended}"
        number = sum(len(each) if each is not None else 1 for each in tests.values())
        result = {
            "run": self.started,
            "state": state,
            "seconds": round(seconds, 1),
            "by": first[0] if first else "",
            "tests": number,
        }
        results = {**self.results, mutant.name: {**asdict(mutant), **result}}
        (self.work / "results.json").write_text(json.dumps(results, indent=1))
        shown = f"{mutant.path}:{mutant.line} {mutant.kind}: {mutant.before[:60]!r} -> {mutant.after[:60]!r}"
        self.say(f"{len(results):3} {state:11} {seconds:5.1f} s {number:3} tests {shown}")

    def summarise(self) -> None:
        """Say how many there are of each package and state."""
        results = self.results
        states = collections.Counter(
            (mutant.path.split("/")[1], results[mutant.name]["state"])
            for mutant in self.chosen if mutant.name in results
        )  # fmt: skip
        for (package, state), count in sorted(states.items()):
            self.say(f"{package:12} {state:12} {count}")

    def _quietly(self) -> list[str]:
        """Return pytest's options; on a busy machine only CPU time is limited."""
        shutil.rmtree(self.work / "tmp", ignore_errors=True)
        plain = ["-q", "--tb=short", "-o", "timeout=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
        return [*plain, f"--basetemp={self.work / 'tmp'}"]


def importing(tree: Path, paths: tuple[str, ...]) -> list[str]:
    """Return the unit tests' files that import a module of these folders and files."""
    modules = [path.removesuffix(".py").removesuffix("/__init__").removesuffix("/").replace("/", ".") for path in paths]
    found = []
    for path in sorted((tree / "tests" / "unit").glob("test_*.py")):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        if any(f"{name}.".startswith(f"{module}.") for name in names for module in modules):
            found.append(str(path.relative_to(tree)))
    return found


def tests_of(mutant: Mutant, reach: dict[str, Any], tree: Path, budget: float) -> Tests:
    """Return the tests that reach a mutant; the module's own files first, and cheap tests first.

    What runs at import is reached by all tests of files that import the module or its package, and by all that reach a
    function of the module.
    """
    first, last = mutant.lines
    own = importing(tree, (mutant.path,))
    users = [] if mutant.in_function else importing(tree, (str(Path(mutant.path).parent),))
    hits: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
    for file, tests in reach.items():
        for test, found in tests.items():
            lines = found["lines"].get(mutant.path, ())
            if any(first <= line <= last for line in lines) or file in users or (lines and not mutant.in_function):
                hits[file].append((found["seconds"], test))
    chosen: Tests = {}
    for file in sorted(hits, key=lambda file: (file not in own, sum(seconds for seconds, _ in hits[file]))):
        kept = []
        for seconds, test in sorted(hits[file]):
            if seconds <= budget:
                budget -= seconds
                kept.append(test)
        if kept:
            chosen[file] = kept
    return chosen


class _Chosen:
    """A pytest plugin: keeps the chosen tests, in this order, and says which failed first."""

    def __init__(self, tests: Tests, out: Path) -> None:
        self._out = out
        self._order = {test: place for place, test in enumerate(test for each in tests.values() for test in each or ())}
        self._whole = {file for file, each in tests.items() if each is None}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = self.of(items)

    def of(self, items: list[Any]) -> list[Any]:
        """Return the chosen ones."""
        kept = [item for item in items if item.nodeid in self._order or item.nodeid.split("::")[0] in self._whole]
        return sorted(kept, key=lambda item: self._order.get(item.nodeid, -1))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._out.write_text(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._out.write_text(f"{report.nodeid} (import)\n{report.longreprtext}")


class _Loop:
    """A pytest plugin: instead of the collected tests, runs the mutants of functions, each in a fork."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def pytest_runtestloop(self, session: Any) -> bool:
        for path in {mutant.path for mutant in self._run.todo}:  # ours are also imported where they are used
            importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        gc.unfreeze()
        functions = self._functions()
        _ready_to_fork()
        run, options = self._run, self._run.options
        reach = run.work / "reach.json"
        if not options.tests:
            self._trace(session, reach)
        for mutant in run.todo:
            if not mutant.in_function:
                continue
            found = json.loads(reach.read_text())
            tests = dict.fromkeys(options.tests) or tests_of(mutant, found, run.tree, options.budget)
            swaps = _swaps(mutant, run.tree, functions)
            if not swaps or any(function.__code__.co_freevars != code.co_freevars for function, code in swaps):
                continue  # out of reach, or a method that no longer calls `super()`: as if it ran at import
            chosen = _Chosen(tests, run.failure)
            items = chosen.of(session.items)
            assert items or not tests, f"{mutant.name}: none of its tests was collected"

            def test(swaps: Any = swaps, chosen: _Chosen = chosen, items: list[Any] = items) -> int:
                for function, code in swaps:
                    function.__code__ = code
                session.config.pluginmanager.register(chosen)
                return _run_items(session, items)

            run.judge(mutant, tests, test)
        return True

    def _trace(self, session: Any, reach: Path) -> None:
        from reach import Reach

        known = json.loads(reach.read_text()) if reach.exists() else {}
        items = [item for item in session.items if item.nodeid.split("::")[0] not in known]

        def trace() -> int:
            session.config.pluginmanager.register(Reach(self._run.tree, PREFIXES, reach))
            return _run_items(session, items, stop=False)

        if items:
            ended, seconds = run_in_fork(trace, self._run.work / "trace.log", cpu_seconds=36000)
            self._run.say(f"{len(items)} tests traced: {ended}, {seconds:.0f} s")
            assert ended == "0", "the tests could not be traced, see trace.log and collect.log"

    def _functions(self) -> dict[tuple[str, str, int], list[FunctionType]]:
        found: dict[tuple[str, str, int], list[FunctionType]] = collections.defaultdict(list)
        for each in gc.get_objects():
            if type(each) is FunctionType and each.__code__.co_filename.startswith(str(self._run.tree)):
                found[_key(each.__code__)].append(each)
        return found


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _swaps(mutant: Mutant, tree: Path, functions: Any) -> list[tuple[FunctionType, CodeType]]:
    """Return the functions that a mutant changes, each with its new code.

    A class's own namespace and functions inside of functions are no functions that one can find: code is compared from
    the outside, and the first function that differs is replaced with all that is inside.
    """
    path = str(tree / mutant.path)
    source = (tree / mutant.path).read_text()
    swaps: list[tuple[FunctionType, CodeType]] = []

    def compare(old: CodeType, new: CodeType) -> None:
        inner = [[each for each in code.co_consts if isinstance(each, CodeType)] for code in (old, new)]
        for before, after in zip(*inner, strict=True):
            if before == after:
                continue
            live = functions.get(_key(before))
            if live:
                swaps.extend((function, after) for function in live)
            else:
                compare(before, after)

    compare(compile(source, path, "exec"), compile(mutant.apply(source), path, "exec"))
    return swaps


def _run_items(session: Any, items: list[Any], *, stop: bool = True) -> int:
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if stop and session.testsfailed:
            return 1
    return 0


@contextlib.contextmanager
def _written(path: Path, changed: str, source: str) -> Iterator[None]:
    """Have a file changed for a while; its compiled form is not left to the next."""

    def write(text: str) -> None:
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()

    write(changed)
    try:
        yield
    finally:
        write(source)


if __name__ == "__main__":
    main()
