"""Whether a model is still what it was: what a CUDA graph cannot see for itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, starmap, zip_longest
from operator import is_
from typing import Any

from torch import nn

# Of a module's private containers, those that say what its ``forward`` does.
PRIVATE = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class Snapshot:
    """A model's modules, where its weights lie, and the values of all attributes (LoRA's scales, FreeU, processors).

    Weights written in place stay the same; all else that changes what ``forward`` does makes another model of it.
    Loops run in C, as a model of thousands of modules is looked over at every call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._tensors = [*model.parameters(), *model.buffers()]
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[list[Any] | tuple[Any, ...]] = []
        for module in self._modules:
            self._expand(vars(module))
            processor = getattr(module, "processor", None)
            if hasattr(processor, "__dict__") and not isinstance(processor, nn.Module):
                self._expand(vars(processor))
        self._classes = list(map(type, self._modules))
        self._values = list(self._current_values())
        self._pointers = self._current_pointers()

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        missing = object()
        return (
            all(starmap(is_, zip_longest(self._values, self._current_values(), fillvalue=missing)))
            and self._pointers == self._current_pointers()
            and self._classes == list(map(type, self._modules))
        )

    def _expand(self, attributes: dict[str, Any]) -> None:
        self._dicts.append(attributes)
        for name, value in attributes.items():
            if name in PRIVATE or not name.startswith("_"):
                if isinstance(value, dict):
                    self._dicts.append(value)
                elif isinstance(value, list | tuple):
                    self._lists.append(value)

    def _current_values(self) -> Iterator[Any]:
        return chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists))

    def _current_pointers(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]
