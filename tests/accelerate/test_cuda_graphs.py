"""``accelerate(cuda_graphs=True)``: which calls are captured, which are replayed, and when a graph is out of date.

Without a device a stand-in for the capture records the call and runs it again where a graph would be replayed.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from pictures import draw, state
from streams import without_a_device
from torch import Tensor, nn
from unets import SAMPLE, TEXT, tiny_unet

from catimage_accel.accelerate import accelerate, acceleration_report, restore
from catimage_accel.accelerate.cuda_graphs import MAX_GRAPHS, GraphedForward, Recorder


@pytest.fixture
def unet() -> UNet2DConditionModel:
    model = tiny_unet(
        block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    accelerate(SimpleNamespace(unet=model))
    model.forward = GraphedForward(model, model.forward)
    return model


def predict(unet: Any, sample: Tensor = SAMPLE, timestep: Any = 500, text: Tensor = TEXT, **arguments: Any) -> Tensor:
    timestep = torch.tensor(timestep) if isinstance(timestep, int) else timestep
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=text, **arguments).sample


def plain(unet: Any, *args: Any, **arguments: Any) -> Tensor:
    """What the model gives without graphs."""
    bare = copy.deepcopy(unet)
    del bare.forward
    return predict(bare, *args, **arguments)


def test_a_replay_takes_the_values_of_its_own_call(unet: Any, captures: list[Any]) -> None:
    calls = [(SAMPLE, 500, TEXT), (2 * SAMPLE, 500, TEXT), (SAMPLE, 20, TEXT), (SAMPLE, 20, -TEXT)]
    results = [predict(unet, *call) for call in calls]
    torch.testing.assert_close(results, [plain(unet, *call) for call in calls], atol=1e-5, rtol=0)
    assert len(captures) == 1


def test_one_graph_for_each_kind_of_call(unet: Any, captures: list[Any]) -> None:
    """They share a pool, and the oldest makes room."""
    kinds: list[tuple[Tensor, dict[str, Any]]] = [
        (SAMPLE, {}),
        (SAMPLE.repeat(1, 1, 2, 1), {}),
        (SAMPLE.contiguous(memory_format=torch.channels_last), {}),
        (SAMPLE, {"cross_attention_kwargs": {"scale": 0.5}}),
        (SAMPLE, {"encoder_attention_mask": torch.ones(1, 5)}),
    ]
    for _ in range(2):
        for sample, arguments in kinds:
            expected = plain(unet, sample, **arguments)
            torch.testing.assert_close(predict(unet, sample, **arguments), expected, atol=1e-5, rtol=0)
    assert len(captures) == len(kinds)
    assert captures[0] is None
    assert None not in captures[1:]
    for side in range(2, 2 + MAX_GRAPHS):
        predict(unet, SAMPLE.repeat(1, 1, 1, side))
    predict(unet)
    assert len(captures) == len(kinds) + MAX_GRAPHS + 1


def test_a_parameter_by_name_or_place_is_the_same_call(unet: Any, captures: list[Any]) -> None:
    with torch.no_grad():
        by_place = unet(SAMPLE, torch.tensor(500), TEXT).sample
        by_name = unet(encoder_hidden_states=TEXT, sample=SAMPLE, timestep=torch.tensor(500)).sample
    torch.testing.assert_close(by_name, by_place, atol=0, rtol=0)
    assert len(captures) == 1


def test_inference_mode_and_no_grad_in_turn(unet: Any, captures: list[Any]) -> None:
    for _ in range(2):
        with torch.inference_mode():
            inside = unet(2 * SAMPLE, torch.tensor(500), TEXT).sample
        torch.testing.assert_close(inside, predict(unet, 2 * SAMPLE), atol=0, rtol=0)
    assert len(captures) == 1


def test_results_stay_the_callers(unet: Any, captures: list[Any]) -> None:
    first = predict(unet)
    before = first.clone()
    predict(unet, 3 * SAMPLE)
    torch.testing.assert_close(first, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda unet: unet(SAMPLE, torch.tensor(500), TEXT).sample,
        lambda unet: predict(unet, SAMPLE, 500.0),
        lambda unet: torch.autocast("cpu", torch.bfloat16)(predict)(unet),
    ],
    ids=["gradients", "a timestep that would be a constant", "autocast"],
)
def test_what_no_graph_can_hold_runs_as_it_is(call: Callable[[Any], Tensor], unet: Any, captures: list[Any]) -> None:
    bare = copy.deepcopy(unet)
    del bare.forward
    torch.testing.assert_close(call(unet), call(bare), atol=1e-5, rtol=0)
    assert captures == []


def weights_loaded(unet: Any) -> None:
    unet.load_state_dict({name: 2 * tensor for name, tensor in unet.state_dict().items()}, assign=True)


def weights_moved(unet: Any) -> None:
    unet.conv_in.weight.data = 2 * unet.conv_in.weight.data


def layer_replaced(unet: Any) -> None:
    unet.mid_block.attentions[0].proj_in = nn.Conv2d(16, 16, 1)


def hooked(unet: Any) -> None:
    unet.conv_out.register_forward_hook(lambda module, args, output: 2 * output)


def free_u(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def kernels_taken_out(unet: Any) -> None:
    restore(SimpleNamespace(unet=unet))


def setting_in_a_dict(unet: Any) -> None:
    unet.conv_in.scaling["default"] = 0.5


def setting_in_a_list(unet: Any) -> None:
    unet.conv_in.merged.append("default")


def processor_setting(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor.scale = 0.5


CHANGES = {
    "weights loaded as new parameters": weights_loaded,
    "weights moved": weights_moved,
    "a layer replaced, as LoRA does": layer_replaced,
    "a hook": hooked,
    "FreeU": free_u,
    "the kernels taken out": kernels_taken_out,
    "a setting in a dict, as LoRA's scales": setting_in_a_dict,
    "a setting in a list, as LoRA's merged adapters": setting_in_a_list,
    "a processor's setting": processor_setting,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_captured_anew(change: Callable[[Any], None], unet: Any, captures: list[Any]) -> None:
    unet.conv_in.scaling, unet.conv_in.merged = {"default": 1.0}, []
    predict(unet)
    predict(unet)
    assert len(captures) == 1
    change(unet)
    torch.testing.assert_close(predict(unet), plain(unet), atol=1e-5, rtol=0)
    assert captures == [None, None]
    predict(unet)
    assert len(captures) == 2


def test_weights_written_in_place_need_no_capture(unet: Any, captures: list[Any]) -> None:
    predict(unet)
    with torch.no_grad():
        unet.conv_out.bias += 1
    torch.testing.assert_close(predict(unet), plain(unet), atol=1e-5, rtol=0)
    assert len(captures) == 1


def test_copies_capture_themselves(unet: Any, captures: list[Any]) -> None:
    expected = predict(unet)
    for count, again in enumerate((pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)), start=2):
        with torch.no_grad():
            again.conv_out.bias += 1
        torch.testing.assert_close(predict(again), expected + 1, atol=1e-5, rtol=0)
        assert len(captures) == count


def test_captures_that_share_memory_are_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = without_a_device(monkeypatch)
    caller, recorder = streams.current, Recorder(torch.device("cuda"))
    first, _ = recorder.capture(lambda: None)
    recorder.capture(lambda: None)
    [(stream, pool), again] = streams.captures
    assert pool is None
    assert again == (stream, first.pool())
    assert stream is not caller


def test_a_capture_that_fails_leaves_the_caller_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = without_a_device(monkeypatch)
    caller = streams.current

    def run() -> None:
        if streams.captures:
            raise ValueError("not to be captured")

    with pytest.raises(RuntimeError, match="invalidated"):
        Recorder(torch.device("cuda")).capture(run)
    assert streams.current is caller


@pytest.fixture
def on_device(sd: StableDiffusionPipeline) -> StableDiffusionPipeline:
    return sd.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"compile": "max-autotune"}], ids=str)
def test_same_image_on_a_device(options: dict[str, Any], on_device: StableDiffusionPipeline) -> None:
    before, expected = state(on_device), draw(on_device)
    accelerate(on_device, cuda_graphs=True, **options)
    for _ in range(2):
        torch.testing.assert_close(draw(on_device), expected, atol=1e-3, rtol=0)
    assert acceleration_report(on_device).cuda_graphs == ("unet",)
    larger = draw(on_device, height=96, width=64)
    assert state(restore(on_device)) == before
    torch.testing.assert_close(larger, draw(on_device, height=96, width=64), atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_a_changed_model_on_a_device(on_device: StableDiffusionPipeline) -> None:
    """Weights that move leave nothing of the graph that read them."""
    accelerate(on_device, cuda_graphs=True)
    draw(on_device)
    on_device.unet.load_state_dict(
        {name: tensor / 2 for name, tensor in on_device.unet.state_dict().items()}, assign=True
    )
    changed = draw(on_device)
    torch.testing.assert_close(changed, draw(restore(on_device)), atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=str)
def test_a_controlnet_and_its_unet_on_a_device(options: dict[str, Any], on_device: StableDiffusionPipeline) -> None:
    """What one graph wrote, the next one reads."""
    controlnet = ControlNetModel.from_unet(on_device.unet, conditioning_embedding_out_channels=(8, 16, 16)).to("cuda")
    pipe = SimpleNamespace(unet=on_device.unet, controlnet=controlnet)
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(module.weight, std=0.1)

    @torch.no_grad()
    def step(seed: int) -> Tensor:
        torch.manual_seed(seed)
        shapes = (2, 4, 8, 8), (2, 5, 32), (2, 3, 32, 32)
        sample, text, image = (torch.randn(shape, device="cuda") for shape in shapes)
        timestep = torch.tensor(500, device="cuda")
        down, mid = controlnet(sample, timestep, text, image, conditioning_scale=0.7, return_dict=False)
        arguments = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return on_device.unet(sample, timestep, text, **arguments).sample

    expected = [step(seed) for seed in range(3)]
    accelerate(pipe, cuda_graphs=True, **options)
    torch.testing.assert_close([step(seed) for seed in range(3)], expected, atol=1e-3, rtol=0)
