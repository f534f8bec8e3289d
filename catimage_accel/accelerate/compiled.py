"""``torch.compile`` of a model's ``forward``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

DEFAULT = "default"
# A mode that captures CUDA graphs -> the same without them.
WITHOUT_GRAPHS = {"reduce-overhead": DEFAULT, "max-autotune": "max-autotune-no-cudagraphs"}


def modes() -> tuple[str, ...]:
    """Of ``torch.compile``, by name."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


class CompiledForward:
    """A model's ``forward`` compiled as one graph, with results that are the caller's own."""

    def __init__(self, plain: Callable[..., Any], mode: str) -> None:
        self.plain = plain
        self.mode = mode
        self._limit_told = False

    @property
    def captures_graphs(self) -> bool:
        """Whether the mode captures CUDA graphs, as it does of models on a CUDA device."""
        return self.mode in WITHOUT_GRAPHS

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """``torch.compile`` works when this is first called, not here."""
        forward: Callable[..., Any] = torch.compile(self.plain, mode=self.mode, fullgraph=True)
        return forward

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledForward, (self.plain, self.mode)  # a copy compiles the copied model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of ``plain``."""
        from torch._dynamo.exc import FailOnRecompileLimitHit

        if self.captures_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            result = self.compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            self._tell_limit()
            return self.plain(*args, **kwargs)
        # A graph's results are overwritten when it runs again; samplers keep them for longer.
        return torch.utils._pytree.tree_map_only(Tensor, _own, result) if self.captures_graphs else result

    def _tell_limit(self) -> None:
        if not self._limit_told:
            self._limit_told = True
            warnings.warn(
                f"torch compiled {self.plain.__qualname__} {torch._dynamo.config.recompile_limit} times, for other "
                "shapes or LoRAs, and compiles it no more: such calls run uncompiled; "
                "torch._dynamo.config.recompile_limit raises the limit",
                UserWarning,
                stacklevel=2,
            )


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_cuda else tensor
