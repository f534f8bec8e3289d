"""Measures what a catalog's candidates cost: FLOPs and milliseconds an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from catimage_accel.catalog import Candidate, Catalog
from catimage_accel.engines.deepcache import runs_whole
from catimage_accel.engines.loading import has_two_text_encoders, latent_size, model_class, read_config
from catimage_accel.engines.protocol import TextBatch
from catimage_accel.engines.text_encoders import text_widths
from catimage_accel.executor import Executor, Job
from catimage_accel.kernels.device import device_name

BATCH_SIZES = (1, 4, 16)
Advance = Callable[[int], None]


def count_flops(catalog: Catalog, advance: Advance = lambda _: None) -> dict[str, int]:
    """Floating-point operations of one image, by candidate; a multiply-add counts as two.

    Counted by torch.utils.flop_counter in matrix products, convolutions and attention, on shapes alone (no weights, no
    work): the text encoder and the cross-attention's keys and values once for the prompt and, with guidance, once for
    the empty prompt; the UNet once and multiplied by the steps, doubled with guidance; the decode.
    """
    texts: dict[Path, int] = {}
    decoders: dict[Path, int] = {}
    unets: dict[Path, tuple[int, int, int]] = {}
    flops = {}
    for candidate in catalog.candidates:
        model = catalog.resolve_model(candidate.model)
        if model not in texts:
            texts[model] = _text_flops(model)
        if model / candidate.vae not in decoders:
            decoders[model / candidate.vae] = _decode_flops(model, candidate.vae)
        if model / candidate.unet not in unets:
            unets[model / candidate.unet] = _unet_flops(model, candidate.unet)
        per_prompt, whole_step, outer_step = unets[model / candidate.unet]
        interval = candidate.options.get("deepcache_interval", 1)
        whole = sum(runs_whole(step, candidate.steps, interval) for step in range(candidate.steps))
        denoise = whole * whole_step + (candidate.steps - whole) * outer_step
        rows = 2 if candidate.guidance_scale > 1 else 1
        flops[candidate.name] = rows * (texts[model] + per_prompt + denoise) + decoders[model / candidate.vae]
        advance(1)
    return flops


def profiled_device(device: torch.device) -> str:
    """What costs.json calls a device: its name, of a processor with its vectors and the number of threads used.

    Virtual machines call processors of several generations by one name, and INT8 is another matter on each.
    """
    if device.type != "cpu":
        return device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{device_name(device)} ({vectors}), {torch.get_num_threads()} threads"


def catalog_executor(
    catalog: Catalog, device: torch.device, *, max_batch: int = 16, reproducible: bool = False
) -> Executor:
    """An executor for ``catalog``'s candidates, each with the engine measured fastest on ``device``."""
    return Executor(
        max_batch=max_batch, device=device, reproducible=reproducible, resolve_model=catalog.resolve_model,
        resolve_lora=catalog.resolve_lora,
        rank_engines=lambda candidate: catalog.engines_for(candidate, profiled_device(device)),
    )  # fmt: skip


def _count(module: Any, *inputs: Any, **named: Any) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **named)
    return counter


def _text_flops(model: Path) -> int:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModel}
    if has_two_text_encoders(model):
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    found = 0
    for part, kind in kinds.items():
        config = CLIPTextConfig.from_pretrained(model / part)
        with torch.device("meta"):
            encoder = kind(config).eval()
            tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.long)
            found += _count(encoder, tokens).get_total_flops()
    return found


def _decode_flops(model: Path, name: str) -> int:
    size = latent_size(read_config(model / "unet" / "config.json"))
    with torch.device("meta"):
        kind = model_class(model, name)
        vae = kind.from_config(kind.load_config(model / name)).eval()
        latents = torch.zeros(1, vae.config.latent_channels, *size)
        return _count(vae.decode, latents).get_total_flops()


def _unet_flops(model: Path, name: str) -> tuple[int, int, int]:
    """(once a prompt, a step, a step between two refreshes of DeepCache's deep features) of one UNet row."""

    config = read_config(model / name / "config.json")
    tokens = read_config(model / "text_encoder" / "config.json")["max_position_embeddings"]
    with torch.device("meta"):
        kind = model_class(model, name)
        unet = kind.from_config(kind.load_config(model / name)).eval()
        sample = torch.zeros(1, unet.config.in_channels, *latent_size(config))
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        pooled = text_widths(model)[1]
        text = TextBatch(torch.zeros(1, tokens, width), [], None if pooled is None else torch.zeros(1, pooled))
        added = text.added_conditions(*latent_size(config))  # sizes of pictures, which cost the same whatever they are
        counter = _count(unet, sample, torch.zeros(1), text.hidden, added_cond_kwargs=added)
    by_module = {module: sum(counts.values()) for module, counts in counter.get_flop_counts().items()}
    root = type(unet).__name__
    last = len(unet.up_blocks) - 1
    text_projections = {
        module: count
        for module, count in by_module.items()
        if module.startswith(f"{root}.") and module.endswith((".attn2.to_k", ".attn2.to_v"))
    }

    def is_outer(module: str) -> bool:
        return module.startswith((f"{root}.down_blocks.0.", f"{root}.up_blocks.{last}."))

    inner_blocks = [f"{root}.mid_block", *(f"{root}.down_blocks.{i}" for i in range(1, len(unet.down_blocks)))]
    inner_blocks += [f"{root}.up_blocks.{i}" for i in range(last)]
    once = sum(text_projections.values())
    once_inner = sum(count for module, count in text_projections.items() if not is_outer(module))
    step = counter.get_total_flops() - once
    inner = sum(by_module.get(block, 0) for block in inner_blocks) - once_inner
    return once, step, step - inner


def time_candidates(
    catalog: Catalog, executor: Executor, batch_sizes: Sequence[int] = BATCH_SIZES, advance: Advance = lambda _: None
) -> dict[str, dict[str, float]]:
    """Milliseconds an image, [candidate][batch size], text encoding and decode included.

    Each set of weights, with each VAE, is timed at two small numbers of steps, the better of two runs, and the time of
    a candidate's own steps is read off the line through both.
    """
    measured: dict[tuple[Any, ...], dict[int, tuple[float, float, int, int]]] = {}
    found: dict[str, dict[str, float]] = {}
    for candidate in catalog.candidates:
        alike = (
            candidate.weights, candidate.vae, candidate.engine, candidate.guidance_scale > 1,
            tuple(sorted(candidate.options.items())),
        )  # fmt: skip
        if alike not in measured:
            interval = candidate.options.get("deepcache_interval", 1)
            # One more than a multiple, so that the last step counts as itself alone where features are kept.
            few, many = 2 * interval + 1, 8 * interval + 1
            # LCM takes 50 steps at most, and a step costs the same whatever the sampler.
            timed = replace(candidate, sampler="euler") if candidate.sampler == "lcm" else candidate
            measured[alike] = {}
            for batch in batch_sizes:
                # Engines are built for a batch size when it is first met.
                _seconds(executor, replace(timed, steps=few), batch)
                measured[alike][batch] = (
                    min(_seconds(executor, replace(timed, steps=few), batch) for _ in range(2)),
                    min(_seconds(executor, replace(timed, steps=many), batch) for _ in range(2)),
                    few, many,
                )  # fmt: skip
        found[candidate.name] = {}
        for batch, (first, second, few, many) in measured[alike].items():
            seconds = first + (candidate.steps - few) * max(0.0, second - first) / (many - few)
            found[candidate.name][str(batch)] = round(max(seconds, 1e-6) * 1000 / batch, 3)
        advance(1)
    return found


def _seconds(executor: Executor, candidate: Candidate, batch: int) -> float:
    prompts = (f"a picture of {index} apples" for index in range(batch))
    jobs = [Job(prompt, candidate, torch.Generator().manual_seed(0)) for prompt in prompts]
    start = time.perf_counter()
    for finished in executor.run(jobs):
        if finished.error is not None:
            raise finished.error
    return time.perf_counter() - start
