"""RoutedPipeline: a diffusers-style call in which every prompt gets the cheapest candidate that draws it well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from catimage_accel.arguments import check_prompts, find_device, generators_for, is_whole
from catimage_accel.catalog import BUILT_IN, Candidate, Catalog
from catimage_accel.choosing import Chooser, Policy
from catimage_accel.engines.loading import latent_size, pixels_per_latent, read_config
from catimage_accel.executor import Finished, Job, Step
from catimage_accel.profiling import catalog_executor

if TYPE_CHECKING:
    from catimage_accel.routing import BudgetPacer

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepCallback = Callable[["RoutedPipeline", int, Any, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Route:
    """Who drew one image, and why.

    ``predicted_quality`` maps every candidate to the catalog's metric as predicted from the prompt (empty if the
    catalog has no router); ``cost`` is an image's, in the catalog's ``cost_unit``; ``milliseconds`` the time from the
    image's first step to its decoded end, other images sharing the device meanwhile (0 before it is drawn).
    """

    prompt: str
    seed: int
    candidate: str
    predicted_quality: dict[str, float]
    cost: float
    milliseconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Drawn:
    """One finished image: its position among the call's images, the image in the asked-for type, and its route.

    A job that failed has its ``error``, and no image.
    """

    index: int
    image: Any
    route: Route
    error: Exception | None = None


@dataclass
class RoutedPipelineOutput(BaseOutput):
    """``images`` as diffusers gives them for the output type, and one ``Route`` an image, in the same order."""

    images: list[Any] | np.ndarray | Tensor
    routes: list[Route]


class RoutedPipeline:
    """Draws prompts with the candidates of a catalog. One thread at a time.

    ``device`` is a torch device; None means the first CUDA device, or the CPU without one. At most ``max_batch``
    images are in flight.
    """

    def __init__(self, catalog: Catalog, device: str | torch.device | None = None, *, max_batch: int = 16) -> None:
        self.catalog = catalog
        self.device = find_device(device)
        self._executor = catalog_executor(catalog, self.device, max_batch=max_batch)
        self._chooser = Chooser(catalog)
        self._progress_bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str] = BUILT_IN, device: str | torch.device | None = None, *, max_batch: int = 16
    ) -> Self:
        """The pipeline of a catalog: a folder, a hub id, or the built-in "emoji". Errors as in ``Catalog.load``."""
        return cls(Catalog.load(name), device, max_batch=max_batch)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for the progress bar of a call (tqdm's, as in diffusers), e.g. ``disable=True``."""
        self._progress_bar = kwargs

    def route(
        self,
        prompt: str | Sequence[str],
        *,
        tradeoff: float | None = None,
        budget: float | BudgetPacer | None = None,
        min_quality: float | None = None,
        candidate: str | None = None,
    ) -> list[Route]:
        """The routes that a call with these arguments would take, seed 0 and no time spent; draws nothing.

        A pacer given as ``budget`` is asked and not charged.
        """
        prompts = check_prompts(prompt)
        choices = self._chooser.choose(prompts, Policy(tradeoff, budget, min_quality, candidate).trial())
        return [
            Route(text, 0, chosen.name, predicted, self.catalog.costs[chosen.name])
            for text, (chosen, predicted) in zip(prompts, choices, strict=True)
        ]

    def pacer(self, budget: float, *, horizon: float = 50) -> BudgetPacer:
        """A budget for a stream: given as ``budget`` to one call after another, their mean cost together keeps to it.

        Fitted on the router's predictions for the profiled prompts; ``budget`` as in a call, ``horizon`` as in
        ``BudgetPacer``. FileNotFoundError without scores or a router.
        """
        return self._chooser.pacer(budget, horizon)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        tradeoff: float | None = None,
        budget: float | BudgetPacer | None = None,
        min_quality: float | None = None,
        candidate: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> RoutedPipelineOutput | tuple[list[Any] | np.ndarray | Tensor, list[Route]]:
        """Draws ``prompt``; what diffusers' pipelines have too means what it means there.

        Args:
            prompt: One prompt or a list. One that is too long for the tokenizer is cut off with a warning.
            tradeoff: Quality, in the catalog's metric, given up to save the dearest candidate's cost: finite, >= 0.
                At most one of this, ``budget``, ``min_quality`` and ``candidate`` is given; none of them means the
                catalog's own tradeoff.
            budget: Mean cost an image, in the catalog's ``cost_unit``: at least the cheapest candidate's. Or a
                ``pacer``, which keeps the mean of all calls that it is given to.
            min_quality: The predicted quality, in the catalog's metric, to draw each prompt with at the lowest cost;
                where no candidate reaches it, the best predicted one draws.
            candidate: Draw everything with the candidate of this name, without routing.
            height, width: Pixels; None means the size that the candidate's UNet was trained on. Costs in the routes
                are those of that size.
            num_images_per_prompt: Images a prompt, >= 1; all with the prompt's candidate.
            generator: One for all images, drawn from in order, or a list with one an image. None draws a seed an image
                from torch's global generator; the routes tell it.
            output_type: "pil": a list of PIL images; "np": float32 (n, height, width, 3) and "pt": float32
                (n, 3, height, width), in [0, 1] by steps of 1/255; "latent": (n, channels, h, w).
            return_dict: False gives the tuple (images, routes).
            callback_on_step_end: Called after each image's step as ``callback(pipeline, step, timestep, {"latents":
                (1, channels, h, w), "index": position of the image})``; ``step`` counts that image's own steps.
                "latents" in the mapping it returns replaces the image's latents.

        Raises:
            ValueError: A wrong argument, before any work; names it, its value and what is accepted.
            Exception: What kept an image from being drawn, when all others are done; ``stream`` hands out those.
        """
        stream = self.stream(
            prompt, tradeoff=tradeoff, budget=budget, min_quality=min_quality, candidate=candidate, height=height,
            width=width, num_images_per_prompt=num_images_per_prompt, generator=generator, output_type=output_type,
            callback_on_step_end=callback_on_step_end,
        )  # fmt: skip
        from tqdm.auto import tqdm

        number = len([prompt] if isinstance(prompt, str) else prompt) * num_images_per_prompt
        found = sorted(tqdm(stream, total=number, **self._progress_bar), key=lambda drawn: drawn.index)
        for drawn in found:
            if drawn.error is not None:
                raise drawn.error
        images: Any = [drawn.image for drawn in found]
        if output_type == "np":
            images = np.stack(images)
        elif output_type in ("pt", "latent"):
            images = torch.stack(images)
        routes = [drawn.route for drawn in found]
        return RoutedPipelineOutput(images, routes) if return_dict else (images, routes)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        tradeoff: float | None = None,
        budget: float | BudgetPacer | None = None,
        min_quality: float | None = None,
        candidate: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[Drawn]:
        """As a call, but yields each image when it is finished. Arguments are checked and weights read before."""
        prompts = check_prompts(prompt)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
        if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt!r}; accepted: a whole number >= 1")
        policy = Policy(tradeoff, budget, min_quality, candidate)
        trial = policy.trial()
        choices = self._chooser.choose(prompts, trial, num_images_per_prompt)
        sizes = {}
        for name in sorted({chosen.name for chosen, _ in choices}):
            self._executor.check(self.catalog.candidate(name))
            sizes[name] = self._latent_shape(self.catalog.candidate(name), height, width)
        if output_type != "pil" and len(set(sizes.values())) > 1:
            raise ValueError(
                f"output_type is {output_type!r}, but the candidates {', '.join(sizes)} draw different sizes; "
                "accepted here: pil, or a height and width for all"
            )
        plan = [
            (text, chosen, predicted)
            for text, (chosen, predicted) in zip(prompts, choices, strict=True)
            for _ in range(num_images_per_prompt)
        ]
        generators = generators_for(generator, len(plan))
        for name in sizes:
            self._load(self.catalog.candidate(name))
        policy.charge(trial)
        return self._draw(plan, generators, height, width, output_type, callback_on_step_end)

    def _load(self, candidate: Candidate) -> None:
        """Reads the candidate's weights, so that unreadable ones are known before any drawing."""
        try:
            self._executor.prepare(candidate)
        except (SafetensorError, RuntimeError, OSError) as error:
            folder = self.catalog.resolve_model(candidate.model)
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder}: weights of candidate {candidate.name!r} can't be read: {reason}") from error

    def _draw(
        self,
        plan: Sequence[tuple[str, Candidate, dict[str, float]]],
        generators: Sequence[torch.Generator],
        height: int | None,
        width: int | None,
        output_type: str,
        callback: StepCallback | None,
    ) -> Iterator[Drawn]:
        def jobs() -> Iterator[Job]:
            for index, (text, chosen, _) in enumerate(plan):
                yield Job(text, chosen, generators[index], key=index, height=height, width=width)

        on_step = None if callback is None else self._on_step(callback)
        for finished in self._executor.run(jobs(), on_step=on_step):
            text, chosen, predicted = plan[finished.key]
            route = Route(
                text, generators[finished.key].initial_seed(), chosen.name, predicted, self.catalog.costs[chosen.name],
                finished.milliseconds,
            )  # fmt: skip
            yield Drawn(finished.key, _converted(finished, output_type), route, finished.error)

    def _on_step(self, callback: StepCallback) -> Callable[[Step], Tensor | None]:
        def on_step(step: Step) -> Tensor | None:
            tensors = {"latents": step.latents[None], "index": step.job.key}
            returned = callback(self, step.index, torch.tensor(step.timestep), tensors) or {}
            latents = returned.get("latents")
            return None if latents is None else latents.reshape(step.latents.shape)

        return on_step

    def _latent_shape(self, candidate: Candidate, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, h, w) of a candidate's latents for an image size in pixels."""
        model = self.catalog.resolve_model(candidate.model)
        unet = read_config(model / candidate.unet / "config.json")
        vae = read_config(model / candidate.vae / "config.json")
        factor = pixels_per_latent(vae)
        sides = []
        for name, pixels, own in zip(
            ("height", "width"), (height, width), latent_size(unet), strict=True
        ):
            if pixels is not None and (not is_whole(pixels) or pixels < factor or pixels % factor):
                raise ValueError(
                    f"{name} is {pixels!r}; candidate {candidate.name!r} accepts positive multiples of {factor} pixels"
                )
            sides.append(own if pixels is None else pixels // factor)
        return unet["in_channels"], sides[0], sides[1]


def _converted(finished: Finished, output_type: str) -> Any:
    """A finished image as ``output_type``; None if it failed."""
    if output_type == "latent":
        return finished.latents
    if finished.image is None:
        return None
    if output_type == "pil":
        return Image.fromarray(finished.image)
    pixels = finished.image.astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
