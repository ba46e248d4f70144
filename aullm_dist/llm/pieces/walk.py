"""Walks the parameters and buffers of a model: each once, in the order of the forward pass, with whoever holds it."""

from collections.abc import Iterator

from torch import nn


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (full name, name, module) of every parameter once, in the order of the forward pass."""
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}" if module_name else name, name, module


def holders_of(model: nn.Module) -> dict[nn.Parameter | None, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, with its name there: shared blocks have the same ones."""
    found: dict[nn.Parameter | None, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((module, name))
    return found


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (full name, name, module) of every buffer that a model keeps in its files."""
    for module_name, module in model.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{module_name}.{name}" if module_name else name, name, module
