"""Pictures of every engine and precision against those of the eager engine, through the executor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from catimage_accel.candidate import Candidate
from catimage_accel.engines.cache import EngineCache
from catimage_accel.executor import Executor, Job

GRAPHS = [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "bf16"),
          ("openvino", "int8")]  # fmt: skip
FUSED = [("fused", "fp32"), ("fused", "bf16")]
ENGINES = [pytest.param(*pair, id=" ".join(pair)) for pair in (*GRAPHS, *FUSED)]
# How much further from float32 than PyTorch in that precision: other sums round otherwise, and what lies on the edge
# between two integers falls to either side.
BOUND = 1.25
# (steps, guidance, DeepCache interval)
MIX = [(4, 3.0, None), (3, 1.0, 2), (5, 2.0, 3), (2, 1.0, None), (4, 4.0, 2)]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(engine_cache: EngineCache) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATIMAGE_ENGINE_CACHE", str(engine_cache.folder))
        yield


def skip_without_bf16(precision: str) -> None:
    import openvino

    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")


@cache
def draw(
    folder: Path, engine: str, precision: str, scales: Path, size: tuple[int, int] | None = None, max_batch: int = 3
) -> list[torch.Tensor]:
    """Latents of the mix, in one run."""
    executor = Executor(device="cpu", max_batch=max_batch)
    jobs = []
    for seed, (steps, guidance, interval) in enumerate(MIX):
        candidate = Candidate(
            "one", str(folder), steps, "ddim", guidance, engine=engine, precision=precision,
            quantization=str(scales) if precision == "int8" else None,
            options={} if interval is None else {"deepcache_interval": interval},
        )  # fmt: skip
        height, width = size or (None, None)
        generator = torch.Generator().manual_seed(seed)
        jobs.append(Job(f"a dog and {seed} lemons", candidate, generator, key=seed, height=height, width=width))
    outcomes = {outcome.key: outcome for outcome in executor.run(jobs)}
    assert [outcomes[seed].error for seed in range(len(jobs))] == [None] * len(jobs)
    assert executor.prepare(jobs[0].candidate)[0].name == engine
    return [torch.as_tensor(outcomes[seed].latents) for seed in range(len(jobs))]


def far(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = torch.stack(actual) - torch.stack(expected)
    return float(difference.norm() / torch.stack(expected).norm())


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.filterwarnings("error:.*openvino|.*onnxruntime:UserWarning")
def test_same_pictures_in_a_mixed_batch(tiny_sd_folder: Path, tiny_int8: Path, engine: str, precision: str) -> None:
    """Slots at a refresh, between two, and without DeepCache share steps."""
    skip_without_bf16(precision)
    whole = draw(tiny_sd_folder, "eager", "fp32", tiny_int8)
    actual = draw(tiny_sd_folder, engine, precision, tiny_int8)
    if precision == "fp32":
        torch.testing.assert_close(actual, whole, atol=1e-3, rtol=0)
    else:
        rounded = far(draw(tiny_sd_folder, "eager", precision, tiny_int8), whole)
        assert 0 < far(actual, whole) < BOUND * rounded


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_same_pictures_of_another_size(tiny_sd_folder: Path, tiny_int8: Path, engine: str) -> None:
    size = (40, 56)
    expected = draw(tiny_sd_folder, "eager", "fp32", tiny_int8, size)
    actual = draw(tiny_sd_folder, engine, "fp32", tiny_int8, size)
    assert actual[0].shape == (4, 10, 14)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_pictures_compiled(tiny_sd_folder: Path, tiny_int8: Path, precision: str) -> None:
    whole = draw(tiny_sd_folder, "eager", "fp32", tiny_int8)
    actual = draw(tiny_sd_folder, "compiled", precision, tiny_int8)
    if precision == "fp32":
        torch.testing.assert_close(actual, whole, atol=1e-3, rtol=0)
    else:
        assert far(actual, whole) < BOUND * far(draw(tiny_sd_folder, "eager", precision, tiny_int8), whole)
