"""``accelerate(compile=...)``: the models compile in place, whole, and nobody but torch sees it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from capturing import Compiler
from diffusers import StableDiffusionPipeline
from pictures import draw, state
from test_components import IMAGE, StableDiffusionControlNetPipeline, new_controlnet
from unets import SAMPLE, TEXT, tiny_unet

from catimage_accel.accelerate import accelerate, acceleration_report, restore


@pytest.fixture
def small() -> SimpleNamespace:
    """A pipeline's UNet with the fewest blocks, as tracing each takes its time."""
    unet = tiny_unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    return SimpleNamespace(unet=unet)


def predict(unet: Any, sample: torch.Tensor = SAMPLE, text: torch.Tensor = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return unet(sample, torch.tensor(500), text).sample


def test_same_image_and_exact_restore(sd: StableDiffusionPipeline, compiler: Compiler) -> None:
    before, expected = state(sd), draw(sd)
    accelerate(sd, compile=True)
    torch.testing.assert_close(draw(sd), expected, atol=1e-4, rtol=0)
    assert compiler.calls == [{"mode": "default", "fullgraph": True}] * 2
    assert compiler.graphs == 2  # UNet and decoder, whole; none for a further step
    draw(sd)
    assert compiler.graphs == 2
    report = acceleration_report(sd)
    assert report.compiled == {"unet": "default", "vae.decoder": "default"}
    assert report.cuda_graphs == ()
    assert state(restore(sd)) == before
    assert acceleration_report(sd).compiled == {}
    torch.testing.assert_close(draw(sd), expected, atol=0, rtol=0)
    assert compiler.graphs == 2


@pytest.mark.parametrize(
    ("mode", "of_decoder"),
    [
        ("default", "default"),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"),
        ("reduce-overhead", "default"),
        ("max-autotune", "max-autotune-no-cudagraphs"),
    ],
)
def test_modes(mode: str, of_decoder: str, sd: StableDiffusionPipeline) -> None:
    """The decoder, which runs once a picture, is captured by no mode."""
    report = acceleration_report(accelerate(sd, compile=mode))
    assert report.compiled == {"unet": mode, "vae.decoder": of_decoder}
    assert report.cuda_graphs == (("unet",) if mode in ("reduce-overhead", "max-autotune") else ())


def test_a_mode_reaches_torch(small: SimpleNamespace, compiler: Compiler) -> None:
    """Without graphs, as on the CPU, the mode that captures them is the same maths."""
    expected = predict(small.unet)
    accelerate(small, compile="reduce-overhead")
    torch.testing.assert_close(predict(small.unet), expected, atol=1e-4, rtol=0)
    assert compiler.calls == [{"mode": "reduce-overhead", "fullgraph": True}]


def test_controlnets(sd: StableDiffusionPipeline, compiler: Compiler) -> None:
    nets = [new_controlnet(sd, seed) for seed in range(2)]
    pipe = StableDiffusionControlNetPipeline(**sd.components, controlnet=nets, requires_safety_checker=False)
    image = IMAGE[..., :32, :32]
    arguments: dict[str, Any] = {"controlnet_cond": image, "conditioning_scale": 0.5, "return_dict": False}
    before = state(pipe)
    with torch.no_grad():
        expected = nets[0](SAMPLE, torch.tensor(500), TEXT, **arguments)
        accelerate(pipe, compile=True)
        torch.testing.assert_close(nets[0](SAMPLE, torch.tensor(500), TEXT, **arguments), expected, atol=1e-4, rtol=0)
    assert compiler.graphs == 1
    assert list(acceleration_report(pipe).compiled) == ["unet", "controlnet.nets.0", "controlnet.nets.1", "vae.decoder"]
    assert state(restore(pipe)) == before


def test_the_last_call_decides(sd: StableDiffusionPipeline, compiler: Compiler) -> None:
    before = state(sd)
    assert acceleration_report(accelerate(accelerate(sd, compile=True), compile="lite")).compiled["unet"] == "lite"
    assert acceleration_report(accelerate(sd)).compiled == {}
    predict(sd.unet)
    assert compiler.graphs == 0
    assert state(restore(sd)) == before


def test_one_more_compilation_serves_all_other_sizes(small: SimpleNamespace, compiler: Compiler) -> None:
    expected = [predict(small.unet, torch.ones(batch, 4, 8, 8), TEXT.expand(batch, 5, 32)) for batch in (1, 2, 3, 5)]
    accelerate(small, compile=True)
    for batch, picture in zip((1, 2, 3, 5), expected, strict=True):
        ours = predict(small.unet, torch.ones(batch, 4, 8, 8), TEXT.expand(batch, 5, 32))
        torch.testing.assert_close(ours, picture, atol=1e-4, rtol=0)
    assert compiler.graphs == 2


def test_past_torchs_limit_it_runs_uncompiled_with_one_warning(small: SimpleNamespace, compiler: Compiler) -> None:
    accelerate(small, compile=True)
    predict(small.unet)
    other = SAMPLE.repeat(1, 1, 2, 2)
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(UserWarning, match=r"torch compiled UNet2DConditionModel.forward 1 times") as told,
    ):
        results = [predict(small.unet, other) for _ in range(2)]
    assert len(told) == 1
    torch.testing.assert_close(results, [predict(restore(small).unet, other)] * 2, atol=1e-4, rtol=0)


def test_saves_what_it_would_have_saved(sd: StableDiffusionPipeline, compiler: Compiler, tmp_path: Path) -> None:
    names = list(sd.unet.state_dict())
    sd.save_pretrained(tmp_path / "plain")
    predict(accelerate(sd, compile=True).unet)
    assert list(sd.unet.state_dict()) == names
    sd.save_pretrained(tmp_path / "compiled")
    plain, compiled = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "plain", tmp_path / "compiled")
    )
    assert compiled == plain


def test_copies_compile_themselves(small: SimpleNamespace, compiler: Compiler) -> None:
    """What was compiled of the first model would read its weights."""
    accelerate(small, compile=True)
    expected = predict(small.unet)
    for again in (pickle.loads(pickle.dumps(small.unet)), copy.deepcopy(small.unet)):
        with torch.no_grad():
            again.conv_out.bias += 1
        torch.testing.assert_close(predict(again), expected + 1, atol=1e-4, rtol=0)
    torch.testing.assert_close(predict(small.unet), expected, atol=0, rtol=0)
    assert len(compiler.calls) == 3


class Note(ModelHook):
    """As offloading has them: it acts around the model's own ``forward``, with what torch could not trace."""

    def __init__(self) -> None:
        self.calls = 0

    @torch.compiler.disable
    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_offloading_switched_on_and_off_later(small: SimpleNamespace, compiler: Compiler) -> None:
    expected, note = predict(small.unet), Note()
    accelerate(small, compile=True)
    add_hook_to_module(small.unet, note)
    torch.testing.assert_close(predict(small.unet), expected, atol=1e-4, rtol=0)
    accelerate(small, compile=True)
    predict(small.unet)
    assert (note.calls, compiler.graphs) == (2, 1)
    restore(small)
    torch.testing.assert_close(predict(small.unet), expected, atol=0, rtol=0)
    assert (note.calls, compiler.graphs, acceleration_report(small).compiled) == (3, 1, {})
    remove_hook_from_module(small.unet)
    torch.testing.assert_close(predict(small.unet), expected, atol=0, rtol=0)
    assert compiler.graphs == 1


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def compiled_and_wrapped(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def decoder_compiled(sd: StableDiffusionPipeline) -> None:
    sd.vae.decoder = torch.compile(sd.vae.decoder, backend="eager")


def offloaded(sd: StableDiffusionPipeline) -> None:
    add_hook_to_module(sd.unet, Note())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"compile": "fastest"}, r"compile is 'fastest'; accepted: False, True .*'reduce-overhead'"),
        (None, {"compile": 1}, r"compile is 1; accepted: False, True"),
        (None, {"compile": None}, r"compile is None; accepted: False, True"),
        (None, {"cuda_graphs": "yes"}, r"cuda_graphs is 'yes'; accepted: True or False"),
        (None, {"cuda_graphs": True}, r"cuda_graphs is True, but unet is on cpu; accepted: .*pipe.to\('cuda'\)"),
        (None, {"cuda_graphs": True, "compile": True}, r"cuda_graphs is True, but unet is on cpu"),
        (None, {"cuda_graphs": True, "compile": "lite"}, r"compile is 'lite', a mode without CUDA graphs; accepted"),
        (compiled_in_place, {"compile": True}, "compile is asked for, but unet was given to torch.compile already"),
        (compiled_and_wrapped, {"cuda_graphs": True}, "cuda_graphs is asked for, but unet was given to torch.compile"),
        (decoder_compiled, {"compile": True}, "compile is asked for, but vae.decoder was given to torch.compile"),
        (offloaded, {"compile": True}, r"the forward of unet was replaced, as offloading does; accepted: .*after it"),
    ],
    ids=[
        "unknown mode", "a number", "no value", "no truth value", "graphs on the CPU", "compiled graphs on the CPU",
        "a mode that has no graphs", "compiled in place already", "compiled already", "decoder compiled already",
        "a hook that torch would have to trace",
    ],
)  # fmt: skip
def test_what_cannot_be_leaves_the_pipeline_alone(
    change: Any, options: dict[str, Any], message: str, sd: StableDiffusionPipeline
) -> None:
    if change is not None:
        change(sd)
    before = state(sd)
    with pytest.raises(ValueError, match=message):
        accelerate(sd, **options)
    assert state(sd) == before


@pytest.mark.parametrize("change", [compiled_in_place, compiled_and_wrapped])
def test_what_someone_compiled_stays_so(change: Any, small: SimpleNamespace) -> None:
    """And takes notice of the kernels that come and go."""
    expected = predict(small.unet)
    change(small)
    predict(small.unet)
    torch.testing.assert_close(predict(accelerate(small).unet), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(predict(restore(small).unet), expected, atol=1e-5, rtol=0)
    assert (small.unet._compiled_call_impl is not None) == (change is compiled_in_place)
    assert hasattr(small.unet, "_orig_mod") == (change is compiled_and_wrapped)


@pytest.mark.slow
def test_the_code_that_torch_generates(sd: StableDiffusionPipeline) -> None:
    expected = draw(sd)
    torch.testing.assert_close(draw(accelerate(sd, compile=True)), expected, atol=1e-4, rtol=0)
