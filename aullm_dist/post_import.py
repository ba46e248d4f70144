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
from importlib.abc import Loader
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
        self.searching = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        # Asking where a module is, as libraries do, is not importing it: the watch ends with the import.
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            # Not patched: one loader may serve many modules.
            spec.loader = _ActingLoader(spec.loader, self)
        return spec

    def act(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self.action(module)


class _ActingLoader(Loader):
    """A loader that acts after another has done the work, and leaves the module as the other would."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> object:
        # Whoever finds the spec without importing may ask its loader for more, such as the source.
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "it is imported by its spec"
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.watch.act(module)
