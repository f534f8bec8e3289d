"""Another ``forward`` for a whole model (compiled, replayed from CUDA graphs, with a deep cache), and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from catimage_accel.accelerate.compiled import DEFAULT, WITHOUT_GRAPHS, CompiledForward, modes
from catimage_accel.accelerate.cuda_graphs import GraphedForward
from catimage_accel.accelerate.deep_blocks import check_deep_blocks, swap_deep_blocks
from catimage_accel.accelerate.deep_cache import DeepCachedForward, interval_of
from catimage_accel.accelerate.modules import DECODER, UNET, denoisers_and_decoder, is_compiled, unwrapped


class ForwardSlot:
    """What stands in a module's ``forward`` attribute.

    Hooks that came later (offloading) hold on to it and call it when it is swapped out again: it then runs the module's
    own ``forward``.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = self.run = self.__wrapped__ = plain  # ``inspect.signature`` looks at ``__wrapped__``

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def compile_mode(compile: Any, cuda_graphs: Any) -> str | None:
    """The mode of ``torch.compile`` that the two arguments of ``accelerate`` ask for; ``None`` for not at all.

    Raises:
        ValueError: One of them is not accepted, or they contradict each other.
    """
    if not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs is {cuda_graphs!r}; accepted: True or False")
    if compile is False:
        return None
    mode = DEFAULT if compile is True else compile
    if not isinstance(mode, str) or mode not in modes():
        raise ValueError(
            f"compile is {compile!r}; accepted: False, True ({DEFAULT!r}) or a mode of torch.compile, "
            f"{', '.join(map(repr, modes()))}"
        )
    if not cuda_graphs or mode in WITHOUT_GRAPHS:
        return mode
    if mode != DEFAULT:
        raise ValueError(
            f"cuda_graphs is True, but compile is {compile!r}, a mode without CUDA graphs; accepted with "
            f"cuda_graphs=True: False, True or {', '.join(map(repr, (DEFAULT, *WITHOUT_GRAPHS)))}"
        )
    return next(graphed for graphed, plain in WITHOUT_GRAPHS.items() if plain == DEFAULT)


def check_forwards(pipe: Any, tier: str, mode: str | None, cuda_graphs: bool) -> None:
    """Raises ValueError where ``swap_forwards`` could not do what it is asked."""
    cached = interval_of(tier) > 1
    if cached and (cuda_graphs or mode in WITHOUT_GRAPHS):
        raise ValueError(
            f"tier is {tier!r}, which keeps features from call to call, where CUDA graphs write over them; accepted "
            "with graphs: tier='lossless'; with this tier: cuda_graphs=False and a mode of torch.compile without graphs"
        )
    if cached:
        check_deep_blocks(unwrapped(pipe.unet), tier)
    whole = mode is not None or cuda_graphs
    if not whole and not cached:
        return
    option = "compile" if mode is not None else "cuda_graphs" if cuda_graphs else f"tier {tier!r}"
    for path, model in denoisers_and_decoder(pipe):
        if not whole and path != UNET:
            continue
        if is_compiled(model):
            raise ValueError(
                f"{option} is asked for, but {path} was given to torch.compile already; accepted: models that were "
                "not, or compile=False, cuda_graphs=False, tier='lossless'"
            )
        if "forward" in vars(model) and _slot(model) is None:
            raise ValueError(
                f"{option} is asked for, but the forward of {path} was replaced, as offloading does; accepted: "
                "models without hooks: call accelerate first and enable_model_cpu_offload() after it"
            )
        device = next((tensor.device for tensor in model.parameters()), None)
        if cuda_graphs and path != DECODER and (device is None or device.type != "cuda"):
            raise ValueError(
                f"cuda_graphs is True, but {path} is on {device}; accepted: a pipeline on a CUDA device, as after "
                "pipe.to('cuda'), or cuda_graphs=False"
            )


def swap_forwards(pipe: Any, tier: str, mode: str | None, cuda_graphs: bool) -> None:
    """Compiles, or graphs, or neither, and keeps what the tier says; what an earlier call did is undone.

    The decoder runs once a picture, with kernels that take longer than their launches: it is compiled, but a graph
    would only hold its memory.
    """
    for path, model in denoisers_and_decoder(pipe):
        if mode is not None:
            own_mode = WITHOUT_GRAPHS.get(mode, mode) if path == DECODER else mode
            slot = _open_slot(model)
            slot.run = CompiledForward(slot.plain, own_mode)
        elif cuda_graphs and path != DECODER:
            slot = _open_slot(model)
            slot.run = GraphedForward(model, slot.plain)
        else:
            _close_slot(unwrapped(model))
        if path == UNET and (interval := interval_of(tier)) > 1:
            slot = _open_slot(model)
            slot.run = DeepCachedForward(slot.run, swap_deep_blocks(model), interval)


def restore_forwards(pipe: Any) -> None:
    """The models' own."""
    for _, model in denoisers_and_decoder(pipe):
        _close_slot(unwrapped(model))


def swapped_forwards(pipe: Any) -> Iterator[tuple[str, CompiledForward | GraphedForward]]:
    """By the model's path."""
    for path, model in denoisers_and_decoder(pipe):
        slot = _slot(unwrapped(model))
        run = None if slot is None else slot.run.inner if isinstance(slot.run, DeepCachedForward) else slot.run
        if isinstance(run, CompiledForward | GraphedForward):
            yield path, run


def deep_cache_interval(pipe: Any) -> int:
    """How many steps the UNet's deep features serve at most."""
    slot = _slot(unwrapped(pipe.unet))
    return slot.run.interval if slot is not None and isinstance(slot.run, DeepCachedForward) else 1


def _slot(model: nn.Module) -> ForwardSlot | None:
    slot = vars(model).get("forward_slot")
    return slot if isinstance(slot, ForwardSlot) else None


def _open_slot(model: nn.Module) -> ForwardSlot:
    slot = _slot(model)
    if slot is None:
        slot = model.forward_slot = model.forward = ForwardSlot(model.forward)
    return slot


def _close_slot(model: nn.Module) -> None:
    slot = _slot(model)
    if slot is None:
        return
    slot.run = slot.plain
    if vars(model).get("forward") is slot:
        del model.forward, model.forward_slot
