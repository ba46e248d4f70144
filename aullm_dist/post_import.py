"""Calls a function as soon as a module is imported by somebody else, and not before.

It lets `import aullm_dist; from transformers import AutoModel` find releases although `import aullm_dist` imports no
transformers: that import takes seconds, and every command pays for `import aullm_dist`. What else was weighed is in
docs/release.md. Each watch is for one module by its exact name; it changes no other import, and ends with the first
import of that module.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[ModuleType], object]) -> None:
    """Call `action` with the module `name` right after its first import; at once if that has happened already."""
    module = sys.modules.get(name)
    # A module that is still being imported is in sys.modules too.
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """A finder that finds nothing itself: it lets the others find the module, and adds the action to its loading."""

    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act
        return spec
