"""Actions that wait for somebody else's import, without importing anything themselves."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from aullm_dist.post_import import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module, and return its name; it counts how often it ran."""
    (tmp_path / "watched_by_a_test.py").write_text("runs = globals().get('runs', 0) + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield "watched_by_a_test"
    sys.modules.pop("watched_by_a_test", None)
    sys.meta_path[:] = before


def test_the_action_follows_the_first_import(module):
    seen = []
    when_imported(module, lambda found: seen.append((found.__name__, found.runs)))
    assert importlib.util.find_spec(module).name == module
    assert module not in sys.modules
    importlib.import_module("json")
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [(module, 1)]
    importlib.reload(imported)
    assert seen == [(module, 1)]
    assert imported.__loader__ is imported.__spec__.loader
    assert type(imported.__loader__).__module__ != "aullm_dist.post_import"
    assert not [finder for finder in sys.meta_path if getattr(finder, "name", None) == module]


def test_a_module_that_is_there_is_acted_on_at_once(module):
    importlib.import_module(module)
    seen = []
    when_imported(module, seen.append)
    assert seen == [sys.modules[module]]


def test_two_actions_may_wait_for_one_module(module):
    seen = []
    when_imported(module, lambda found: seen.append("first"))
    when_imported(module, lambda found: seen.append("second"))
    importlib.import_module(module)
    assert sorted(seen) == ["first", "second"]


def test_a_module_that_does_not_exist_is_still_missing():
    before = list(sys.meta_path)
    when_imported("no_such_module_anywhere", lambda found: pytest.fail("there is none"))
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module_anywhere")
    finally:
        sys.meta_path[:] = before


def test_import_aullm_dist_imports_no_library():
    code = (
        "import sys; before = set(sys.modules); import aullm_dist; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "assert new == {'aullm_dist'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
