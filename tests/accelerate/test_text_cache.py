"""Keys and values of a prompt are computed once, and never outlive what they were made of."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pictures import draw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from catimage_accel.accelerate import accelerate

SAMPLE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def new_text(seed: int = 0) -> Tensor:
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))


def predict(unet: Any, text: Tensor) -> Tensor:
    with torch.no_grad():
        return unet(SAMPLE, 500, text).sample


def cross_attentions(unet: Any) -> list[Any]:
    return [layer for layer in unet.modules() if getattr(layer, "is_cross_attention", False)]


def kept(unet: Any) -> int:
    return sum(len(layer.processor.text_cache) for layer in cross_attentions(unet))


@pytest.fixture
def unet(sd: StableDiffusionPipeline) -> Any:
    return accelerate(sd).unet


@contextmanager
def count_calls(monkeypatch: pytest.MonkeyPatch, layer: nn.Linear) -> Iterator[list[int]]:
    calls: list[int] = []
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self is layer:
            calls.append(1)
        return plain(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        yield calls


def test_a_pipeline_projects_a_prompt_once(sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(sd)
    accelerate(sd)
    for _ in range(2):
        with count_calls(monkeypatch, cross_attentions(sd.unet)[0].to_k) as calls:
            torch.testing.assert_close(draw(sd), expected, atol=1e-4, rtol=0)
        assert len(calls) == 1
    gc.collect()
    assert kept(sd.unet) == 0  # it went with the call's text


def test_two_texts_in_turn_are_both_kept(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each half of the guidance is a call of its own."""
    texts = new_text(1), new_text(2)
    with count_calls(monkeypatch, cross_attentions(unet)[0].to_v) as calls:
        for _ in range(3):
            for text in texts:
                predict(unet, text)
    assert len(calls) == 2


def test_a_third_text_drops_the_oldest(unet: Any) -> None:
    texts = [new_text(seed) for seed in range(3)]
    results = [predict(unet, text) for text in texts]
    assert kept(unet) == 2 * len(cross_attentions(unet))
    torch.testing.assert_close([predict(unet, text) for text in texts], results, atol=0, rtol=0)


def test_is_gone_with_the_text(unet: Any) -> None:
    text = new_text()
    predict(unet, text)
    assert kept(unet) == len(cross_attentions(unet))
    del text
    assert kept(unet) == 0


class Lora(nn.Module):
    """What stands in for a layer while LoRA is loaded; merges by ``weight.data``, as peft does."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta = torch.randn(base_layer.weight.shape, generator=torch.Generator().manual_seed(5)) / 4
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * x @ self.delta.T

    def merge(self) -> None:
        self.base_layer.weight.data += self.scale * self.delta


def load_lora(unet: Any) -> None:
    for layer in cross_attentions(unet):
        layer.to_k, layer.to_v = Lora(layer.to_k), Lora(layer.to_v)


def unload_lora(unet: Any, *, merge: bool) -> None:
    for layer in cross_attentions(unet):
        for name in ("to_k", "to_v"):
            lora = getattr(layer, name)
            if merge:
                lora.merge()
            setattr(layer, name, lora.base_layer)


def lora_loaded(unet: Any, text: Tensor) -> Tensor:
    load_lora(unet)
    return text


def lora_scaled(unet: Any, text: Tensor) -> Tensor:
    load_lora(unet)
    predict(unet, text)
    for layer in cross_attentions(unet):
        layer.to_k.scale = layer.to_v.scale = 0.3
    return text


def lora_merged(unet: Any, text: Tensor) -> Tensor:
    load_lora(unet)
    unload_lora(unet, merge=True)
    return text


def weights_in_place(unet: Any, text: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in cross_attentions(unet):
            layer.to_v.weight.mul_(2)
    return text


def optimizer_step(unet: Any, text: Tensor) -> Tensor:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1)
    unet(SAMPLE, 500, text).sample.square().mean().backward()
    optimizer.step()
    return text


def state_dict_loaded(unet: Any, text: Tensor, *, assign: bool = False) -> Tensor:
    doubled = {name: 2 * tensor if "attn2.to_k" in name else tensor for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(doubled, assign=assign)
    return text


def data_replaced(unet: Any, text: Tensor) -> Tensor:
    for layer in cross_attentions(unet):
        layer.to_k.weight.data = 2 * layer.to_k.weight.data
    return text


def new_layer(unet: Any, text: Tensor) -> Tensor:
    for layer in cross_attentions(unet):
        layer.to_k = nn.Linear(layer.to_k.in_features, layer.to_k.out_features, bias=False)
    return text


def hooked(unet: Any, text: Tensor) -> Tensor:
    for layer in cross_attentions(unet):
        layer.to_v.register_forward_hook(lambda module, args, output: 2 * output)
    return text


def freed_and_new(unet: Any, text: Tensor) -> Tensor:
    del text
    return new_text(7)  # the allocator gives it the old one's memory


def text_in_place(unet: Any, text: Tensor) -> Tensor:
    return text.copy_(new_text(7))


def text_through_a_view(unet: Any, text: Tensor) -> Tensor:
    text[0, 2:].neg_()
    return text


def text_in_inference_mode(unet: Any, text: Tensor) -> Tensor:
    with torch.inference_mode():
        text.neg_()
    return text


def text_data_replaced(unet: Any, text: Tensor) -> Tensor:
    text.data = new_text(7)
    return text


def text_cut_in_place(unet: Any, text: Tensor) -> Tensor:
    text.data = text.data[:, :3]
    return text


CHANGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another prompt": lambda unet, text: new_text(7),
    "another prompt in the freed one's memory": freed_and_new,
    "prompt changed in place": text_in_place,
    "prompt changed through a view": text_through_a_view,
    "prompt changed in inference mode": text_in_inference_mode,
    "prompt with other data": text_data_replaced,
    "prompt with less of the same data": text_cut_in_place,
    "weights changed in place": weights_in_place,
    "weights trained": optimizer_step,
    "weights loaded": state_dict_loaded,
    "weights loaded as new parameters": lambda unet, text: state_dict_loaded(unet, text, assign=True),
    "weights with other data": data_replaced,
    "another layer": new_layer,
    "LoRA loaded": lora_loaded,
    "LoRA scaled": lora_scaled,
    "LoRA merged and unloaded, which torch counts no change of": lora_merged,
    "a hook that changes the values": hooked,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_stale(unet: Any, change: Callable[[Any, Tensor], Tensor]) -> None:
    texts = [new_text()]  # no second name, so that a change can free it
    before = predict(unet, texts[0])
    assert kept(unet) == len(cross_attentions(unet))
    text = change(unet, texts.pop())
    after = predict(unet, text)
    torch.testing.assert_close(after, predict(copy.deepcopy(unet), text), atol=0, rtol=0)  # copies start empty
    assert (after - before).abs().max() > 1e-4


def test_lora_unloaded(unet: Any) -> None:
    text = new_text()
    before = predict(unet, text)
    load_lora(unet)
    predict(unet, text)
    unload_lora(unet, merge=False)
    torch.testing.assert_close(predict(unet, text), before, atol=0, rtol=0)


def test_accelerating_again_forgets(sd: StableDiffusionPipeline) -> None:
    """The way out where weights were changed through ``data``."""
    text = new_text()
    predict(accelerate(sd).unet, text)
    assert kept(sd.unet) > 0
    assert kept(accelerate(sd).unet) == 0


def in_inference_mode(unet: Any) -> Tensor:
    with torch.inference_mode():
        text = new_text()
        unet(SAMPLE, 500, text)
        text.neg_()  # torch does not count this
        torch.testing.assert_close(
            unet(SAMPLE, 500, text).sample, unet(SAMPLE, 500, text.clone()).sample, atol=0, rtol=0
        )
    return text


def with_gradients(unet: Any) -> Tensor:
    text = new_text()
    for _ in range(2):  # a graph that was kept could not be walked twice
        unet(SAMPLE, 500, text).sample.sum().backward()
    return text


def with_autocast(unet: Any) -> Tensor:
    text = new_text()
    with torch.autocast("cpu", torch.bfloat16):
        predict(unet, text)
    return text


def traced(unet: Any) -> Tensor:
    unet.requires_grad_(False)
    text = new_text()
    with torch.no_grad():
        graph = torch.jit.trace(lambda sample, text: unet(sample, 500, text).sample, (SAMPLE, text), check_trace=False)
        torch.testing.assert_close(graph(SAMPLE, -text), unet(SAMPLE, 500, -text).sample, atol=1e-4, rtol=0)
    return text


def counted(unet: Any) -> Tensor:
    text = new_text()
    with FlopCounterMode(display=False) as first:
        predict(unet, text)
    with FlopCounterMode(display=False) as second:
        predict(unet, text)
    assert first.get_total_flops() == second.get_total_flops()
    return text


@pytest.mark.parametrize(
    "call",
    [in_inference_mode, with_gradients, with_autocast, traced, counted],
    ids=["inference tensors have no version", "gradients flow", "autocast decides", "traced", "work is counted"],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_nothing_is_kept(unet: Any, call: Callable[[Any], Tensor]) -> None:
    text = call(unet)
    assert kept(unet) == 0
    del text  # alive until here: what is kept would have gone with it
