"""The lossy tiers of ``accelerate``: what lies deep in a UNet is kept for some steps (DeepCache, arXiv 2312.00858).

Between refreshes a call runs the first down block, the last up block and what is around them; the blocks between stand
still. The UNet's own ``forward`` runs as ever, so ControlNets, FreeU, LoRA, IP-Adapters and hooks work as without.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from catimage_accel.accelerate.deep_blocks import DeepFeatures

INTERVALS = {"lossless": 1, "high": 2, "fast": 3}
"""Tier -> how many steps the deep features serve at most."""
OLDEST = 10
"""No features are used that are older than one step in so many of the loop: what changes from one of a few steps to the
next is too much for it."""
MAX_TEXTS = 2  # a thread's: guided pipelines that call the UNet once for each half alternate between two


@dataclass(eq=False)
class _Denoising:
    """Where the denoising of one text is."""

    text: weakref.ref[Tensor]
    thread: int  # two of them may draw the same
    kind: tuple[Any, ...]
    place: Any
    age: int
    kept: Tensor | None
    repeats: bool  # there is more than one pass a step, and no telling which of them a call is


class DeepCachedForward:
    """A UNet's ``forward`` with the deep blocks run at every ``interval``-th call of a denoising loop, and at its last.

    Short loops are given less: features serve two steps from ``OLDEST`` steps on, three from twice as many.

    A loop is told by its calls: the very same text tensor, latents of one shape, and timesteps that go on, which they
    do where each lies behind the one before in the same tensor (as in ``for t in scheduler.timesteps``) or is a smaller
    number. Every other call is a refresh, so a loop that makes a tensor of every timestep, or passes one text several
    times a step (perturbed attention), is right and no faster. The number of steps and the last of them are known where
    timesteps are parts of one tensor.
    Calls with gradients or T2I-Adapters, and those that are traced or captured, run whole. Threads take turns: what is
    kept belongs to the UNet, whose blocks ask for it.
    """

    def __init__(self, inner: Callable[..., Any], features: DeepFeatures, interval: int) -> None:
        self.inner, self.interval = inner, interval
        self._features = features
        self._running: tuple[_Denoising, ...] = ()
        self._turn = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return DeepCachedForward, (self.inner, self._features, self.interval)

    def __call__(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the UNet's ``forward``."""
        with self._turn:
            return self._run(sample, timestep, encoder_hidden_states, *args, **kwargs)

    def _run(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = self._features
        denoising = None
        if _takes(sample, encoder_hidden_states, kwargs):
            denoising = self._find(sample, timestep, encoder_hidden_states)
        features.skips = denoising is not None and denoising.age > 0
        features.kept = denoising.kept if features.skips and denoising is not None else None
        try:
            result = self.inner(sample, timestep, encoder_hidden_states, *args, **kwargs)
            if denoising is not None:
                denoising.kept = features.kept
        except BaseException:
            self._running = ()
            raise
        finally:
            features.skips, features.kept = False, None
        return result

    def _find(self, sample: Tensor, timestep: Any, text: Tensor) -> _Denoising:
        """The loop that this call belongs to, at the age of its features: 0 where they have to be made."""
        thread = threading.get_ident()
        kind = (sample.shape, sample.dtype, sample.device)
        place = _place(timestep)
        mine = [one for one in self._running if one.thread == thread]
        for one in mine:
            if one.text() is text and one.kind == kind and _goes_on(one.place, place):
                one.place = place
                interval = _interval(timestep, self.interval)
                fresh = one.kept is None or one.repeats or _is_last(timestep)
                one.age = 0 if fresh else (one.age + 1) % interval
                return one
        this = weakref.ref(self)

        def forget_text(dead: weakref.ref[Tensor]) -> None:
            forward = this()
            if forward is not None:
                with forward._turn:
                    forward._running = tuple(one for one in forward._running if one.text is not dead)

        repeats = any(one.text() is text and one.place == place for one in mine)
        new = _Denoising(weakref.ref(text, forget_text), thread, kind, place, 0, None, repeats)
        others = [one for one in self._running if one.thread != thread]
        self._running = (new, *[one for one in mine if one.text() is not text][: MAX_TEXTS - 1], *others)
        return new


def _takes(sample: Tensor, text: Any, kwargs: dict[str, Any]) -> bool:
    # T2I-Adapters add to what comes out of down blocks, in place; older pipelines call them by ControlNets' argument.
    adapters = kwargs.get("down_intrablock_additional_residuals") is not None or (
        kwargs.get("down_block_additional_residuals") is not None
        and kwargs.get("mid_block_additional_residual") is None
    )
    return isinstance(text, Tensor) and not (
        adapters
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or (sample.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _place(timestep: Any) -> Any:
    """Where a call is in its loop, without waiting for the device: see ``_goes_on``."""
    if isinstance(timestep, Tensor):
        return timestep.untyped_storage().data_ptr(), timestep.storage_offset()
    return -float(timestep)


def _interval(timestep: Any, most: int) -> int:
    """How many steps features serve in a loop of so many as the tensor has that the timestep is a part of."""
    if not isinstance(timestep, Tensor):
        return most
    steps = timestep.untyped_storage().nbytes() // timestep.element_size()
    return min(most, 1 + steps // OLDEST)


def _is_last(timestep: Any) -> bool:
    """Whether it is the last of the tensor that it is a part of: what old features spoil there no step makes good."""
    if not isinstance(timestep, Tensor):
        return False
    storage = timestep.untyped_storage()
    return (timestep.storage_offset() + 1) * timestep.element_size() == storage.nbytes()


def _goes_on(before: Any, now: Any) -> bool:
    if isinstance(before, tuple) and isinstance(now, tuple):
        return bool(before[0] == now[0] and before[1] < now[1])
    return isinstance(before, float) and isinstance(now, float) and before < now


def interval_of(tier: Any) -> int:
    """How many steps the deep features of a tier serve; ValueError for an unknown tier."""
    if not isinstance(tier, str) or tier not in INTERVALS:
        raise ValueError(f"tier is {tier!r}; accepted: {', '.join(map(repr, INTERVALS))}")
    return INTERVALS[tier]
