"""The executor: takes jobs of any candidates, draws them in shared batches, hands images back as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from catimage_accel.engines import Engine, LoadedEngines
from catimage_accel.executor.flight import Flight, OnStep
from catimage_accel.executor.job import Finished, Job, check_guidance
from catimage_accel.executor.samplers import SamplerTable, read_scheduler_config, sampler_table

if TYPE_CHECKING:
    from catimage_accel.candidate import Candidate
    from catimage_accel.lora import UNetPart

__all__ = ["Executor"]


class Executor:
    """Draws jobs with step-level batching.

    Work is batched by the denoising step. Candidates that share UNet weights (model, ``unet``, engine, precision)
    share batches, whatever their sampler, steps, guidance, DeepCache interval or VAE: every row has its own timestep
    and coefficients. Between steps finished images leave and waiting jobs join. An image depends on its job only,
    beyond rounding: float32 latents are those of diffusers' pipeline with the sampler's scheduler to 1e-3.

    With precision "bf16" or "fp16" the text encoder, the UNet and the decoder run in that type (a float16 decoder
    whose config says ``force_upcast``: in float32); samples are float32 between the steps, where diffusers would
    round them.

    A job that fails costs no other job its image. What is wrong with one job (a missing folder, an unknown sampler, an
    exception in the step or the decode) comes back as its :class:`Finished` with ``error`` set; a step or a decode that
    fails for a batch is repeated image by image to find the one at fault. To have such errors raised before any
    work starts, call :meth:`check` first. If ``jobs`` itself raises, the jobs taken on until then are finished and
    the error is raised after them. What ``on_step`` raises is raised at once.

    Not thread-safe: one run at a time.
    """

    def __init__(
        self,
        *,
        max_batch: int = 16,
        device: torch.device | str | None = None,
        resolve_model: Callable[[str], Path] | None = None,
        resolve_lora: Callable[[str], Path] | None = None,
        rank_engines: Callable[[Candidate], Sequence[str]] | None = None,
        fall_back: bool = True,
        reproducible: bool = False,
    ) -> None:
        """
        Args:
            max_batch: Most images stepped together (with guidance, two UNet rows each); 1 or more.
            device: Where to run; None: CUDA where there is one, else the CPU.
            resolve_model: Turns a candidate's ``model`` into a folder, e.g. ``Catalog.resolve_model``; None takes it
                for a path.
            resolve_lora: Turns a candidate's ``lora`` into a file, e.g. ``Catalog.resolve_lora``; None takes it for a
                path.
            rank_engines: The engines to try for a candidate, best first, e.g. ``Catalog.engines_for`` on this device;
                None: the candidate's own, "eager" for "auto". One that can't run here is passed over with a warning.
            reproducible: Whether an image has the same bits whatever is drawn beside it, and not only up to rounding:
                then engines of which that does not hold for the rows of a batch are called image by image, which
                costs what their batches gain.
            fall_back: Whether "eager" runs where no engine of the ranking can; else :class:`EngineUnavailable` raises.
        """
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch is {max_batch!r}; accepted: a whole number from 1")
        self.max_batch = max_batch
        self.reproducible = reproducible
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._resolve_model = resolve_model or Path
        self._resolve_lora = resolve_lora or Path
        self._rank_engines = rank_engines or _own_engine
        self._engines = LoadedEngines(self.device, fall_back=fall_back)
        self._tables: dict[tuple[Path, str, int, str | None], SamplerTable] = {}
        self._prepared: dict[tuple[Any, ...], tuple[Engine, SamplerTable]] = {}
        self._batch_limits: dict[tuple[int, torch.Size], int] = {}

    def check(self, candidate: Candidate) -> None:
        """Raises ValueError or FileNotFoundError for a candidate that can't be drawn; reads configs, no weights."""
        model = self._resolve_model(candidate.model)
        self._engines.check(
            model, self._unet(candidate), self._rank_engines(candidate), candidate.precision,
            self._quantization(candidate), candidate.vae,
        )  # fmt: skip
        check_guidance(candidate.guidance_scale)
        for option, value in candidate.options.items():
            if option != "deepcache_interval":
                raise ValueError(f"option is {option!r}; accepted: deepcache_interval")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"deepcache_interval is {value!r}; accepted: a whole number from 1")
        self._table(model, candidate)

    def prepare(self, candidate: Candidate) -> tuple[Engine, SamplerTable]:
        """What draws the candidate, loaded on first use. Raises as :meth:`check` does, and for unreadable weights."""
        c = candidate
        key = (
            *c.weights, c.vae, c.engine, c.sampler, c.steps, c.timestep_spacing,
            c.guidance_scale, repr(dict(c.options)),
        )  # fmt: skip
        if key not in self._prepared:
            self.check(candidate)
            model = self._resolve_model(candidate.model)
            engine = self._engines.get(
                model, self._unet(candidate), self._rank_engines(candidate), candidate.precision,
                self._quantization(candidate), deepcache="deepcache_interval" in candidate.options, vae=candidate.vae,
            )  # fmt: skip
            self._prepared[key] = (engine, self._table(model, candidate))
        return self._prepared[key]

    def run(self, jobs: Iterable[Job], *, on_step: OnStep | None = None) -> Iterator[Finished]:
        """Draws the jobs; yields each as it finishes, so not in the order of ``jobs``.

        ``jobs`` is pulled lazily, at most ``max_batch`` jobs beyond those that fit into batches at once; ``next`` on it
        should not block for long, for nothing is drawn meanwhile. ``on_step`` is called with a :class:`Step` for every
        image after each of its steps, and may return latents to go on from.
        """
        flight = Flight(self, on_step)
        remaining: Iterator[Job] | None = iter(jobs)
        jobs_error: Exception | None = None
        while remaining is not None or not flight.idle:
            # Looking a batch ahead keeps the other groups fed when many jobs of one group come in a row.
            while remaining is not None and flight.without_room < self.max_batch and not flight.has_finished:
                try:
                    job = next(remaining)
                except StopIteration:
                    remaining = None
                except Exception as error:
                    remaining, jobs_error = None, error
                else:
                    flight.take(job)
            yield from flight.advance()
        if jobs_error is not None:
            raise jobs_error

    def batch_limit(self, engine: Engine, shape: torch.Size) -> int:
        """Most images of this shape of latents that are stepped together with ``engine``: ``max_batch``, or fewer
        once so many were too much for its memory."""
        return self._batch_limits.get((id(engine), shape), self.max_batch)

    def lower_batch_limit(self, engine: Engine, shape: torch.Size, limit: int) -> None:
        """Remembers that no more than ``limit`` images fit into the memory, for all that follows."""
        self._batch_limits[id(engine), shape] = limit

    def _unet(self, candidate: Candidate) -> UNetPart:
        return candidate.unet_part(self._resolve_lora)

    def _quantization(self, candidate: Candidate) -> Path | None:
        return None if candidate.quantization is None else self._resolve_model(candidate.quantization)

    def _table(self, model: Path, candidate: Candidate) -> SamplerTable:
        key = (model, candidate.sampler, candidate.steps, candidate.timestep_spacing)
        if key not in self._tables:
            _, sampler, steps, spacing = key
            self._tables[key] = sampler_table(sampler, steps, read_scheduler_config(model), spacing)
        return self._tables[key]


def _own_engine(candidate: Candidate) -> tuple[str, ...]:
    return ("eager",) if candidate.engine == "auto" else (candidate.engine,)
