"""Keys and values of a prompt, kept while the prompt is the same: they do not change over the denoising steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from catimage_accel.accelerate.modules import is_hooked

MAX_TEXTS = 2  # guided pipelines that call the UNet once for each half alternate between two


@dataclass(frozen=True, eq=False)
class _Entry:
    text: weakref.ref[Tensor]
    sources: tuple[weakref.ref[Any], ...]  # the projections and their weights
    stamp: tuple[Any, ...]
    keys: Tensor
    values: Tensor

    def is_made_of(self, text: Tensor, sources: list[Any], stamp: tuple[Any, ...]) -> bool:
        return (
            self.text() is text
            and self.stamp == stamp
            and len(self.sources) == len(sources)
            and all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        )


class TextCache:
    """What one cross-attention layer made of the last texts.

    An entry holds for the very same tensors (text, weights, biases) at the same version counters, and goes with its
    text: diffusers' pipelines make theirs anew in every call. torch counts every in-place change but those through
    ``tensor.data`` or shared memory (NumPy); who changes weights that way, between calls on one and the same text
    tensor, calls ``forget``. (LoRA merges weights so; whoever owns the layer calls ``forget`` as LoRA comes and goes.)
    """

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = ()

    def __reduce__(self) -> tuple[type[TextCache], tuple[()]]:
        return TextCache, ()  # copies and pickles start empty

    def __len__(self) -> int:
        return len(self._entries)

    def forget(self) -> None:
        """Everything."""
        self._entries = ()

    def keys_and_values(self, to_k: nn.Module, to_v: nn.Module, text: Tensor) -> tuple[Tensor, Tensor]:
        """``to_k(text)`` and ``to_v(text)``, which the caller must not change."""
        stamp = _stamp(to_k, to_v, text)
        if stamp is None:
            self.forget()
            return to_k(text), to_v(text)
        sources = _sources(to_k, to_v)
        for entry in self._entries:
            if entry.is_made_of(text, sources, stamp):
                return entry.keys, entry.values
        keys, values = to_k(text), to_v(text)
        this = weakref.ref(self)

        def forget_text(dead: weakref.ref[Tensor]) -> None:
            cache = this()
            if cache is not None:
                cache._entries = tuple(entry for entry in cache._entries if entry.text is not dead)

        entry = _Entry(weakref.ref(text, forget_text), tuple(map(weakref.ref, sources)), stamp, keys, values)
        others = [other for other in self._entries if other.text() is not text]
        self._entries = (entry, *others)[:MAX_TEXTS]
        return keys, values


def says_all(projection: nn.Module) -> bool:
    """Whether the weights say what is computed: layers of other classes (LoRA, quantised) compute more."""
    return type(projection) is nn.Linear and not is_hooked(projection)


def _sources(to_k: nn.Module, to_v: nn.Module) -> list[Any]:
    found = [to_k, to_k.weight, to_k.bias, to_v, to_v.weight, to_v.bias]
    return [source for source in found if source is not None]


def _stamp(to_k: nn.Module, to_v: nn.Module, text: Tensor) -> tuple[Any, ...] | None:
    """Where and at which version the sources are, or ``None`` where nothing may be kept."""
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(text.device.type)
        or torch.jit.is_tracing()  # what is kept would become a constant of the graph, as in a CUDA graph
        or (text.is_cuda and torch.cuda.is_current_stream_capturing())
        or is_in_torch_dispatch_mode()
    ):
        return None
    if not (says_all(to_k) and says_all(to_v)):
        return None
    tensors = [text, *(source for source in _sources(to_k, to_v) if isinstance(source, Tensor))]
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    try:
        places = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
    except RuntimeError:  # inference tensors have no version, and those inside vmap no memory of their own
        return None
    # Work on another stream would not wait for what is kept.
    stream = torch.cuda.current_stream(text.device).cuda_stream if text.is_cuda else None
    return text.shape, text.stride(), stream, *places
