"""ImageReward with a small random model under the names of the published weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_cache import in_hub
from PIL import Image

from catimage_accel.quality import ImageReward, Metric

PROMPTS = ["a dog", "two red cats", "a cat " * 60, ""]
WIDTH, TEXT = 128, 32
CONFIG = {
    "vocab_size": 14, "hidden_size": TEXT, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 768,
    "model_type": "bert", "type_vocab_size": 2, "add_cross_attention": True,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "red", "##s", "two", "blue"]
HEAD = ((0, TEXT, 24), (2, 24, 12), (4, 12, 8), (6, 8, 4), (7, 4, 1))


def published() -> dict[str, torch.Tensor]:
    """Random weights under the names in ImageReward.pt, those that scoring does not need included."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        found[name] = 0.3 * torch.randn(shape, generator=generator)

    def linear(name: str, wide: int, out: int) -> None:
        add(f"{name}.weight", out, wide)
        add(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{vision}.cls_token", 1, 1, WIDTH)
    add(f"{vision}.pos_embed", 1, 1 + 4, WIDTH)
    add(f"{vision}.patch_embed.proj.weight", WIDTH, 3, 16, 16)
    add(f"{vision}.patch_embed.proj.bias", WIDTH)
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
    norm(f"{vision}.norm", WIDTH)
    add(f"{text}.embeddings.word_embeddings.weight", CONFIG["vocab_size"], TEXT)  # type: ignore[arg-type]
    add(f"{text}.embeddings.position_embeddings.weight", 64, TEXT)
    found[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for attention, wide in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", wide, TEXT)
            linear(f"{layer}.{attention}.self.value", wide, TEXT)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 48)
        linear(f"{layer}.output.dense", 48, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    for number, wide, out in HEAD:
        linear(f"mlp.layers.{number}", wide, out)
    linear("blip.vision_proj", WIDTH, 4)
    linear("blip.text_proj", TEXT, 4)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(published(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def by_hand(state: dict[str, torch.Tensor], image: np.ndarray, tokens: list[int]) -> float:
    """The reward of one (32, 32, 3) image and one prompt without padding, from the paper's layers written out."""
    F = torch.nn.functional

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)

    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    eye = "blip.visual_encoder"
    patches = F.conv2d(pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], 16)
    seen = torch.cat([state[f"{eye}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{eye}.pos_embed"][0]
    for i in range(2):
        q, k, v = linear(f"{eye}.blocks.{i}.attn.qkv", norm(f"{eye}.blocks.{i}.norm1", seen, 1e-6)).chunk(3, dim=-1)
        seen = seen + linear(f"{eye}.blocks.{i}.attn.proj", attend(q, k, v))
        wide = linear(f"{eye}.blocks.{i}.mlp.fc1", norm(f"{eye}.blocks.{i}.norm2", seen, 1e-6))
        seen = seen + linear(f"{eye}.blocks.{i}.mlp.fc2", F.gelu(wide))
    seen = norm(f"{eye}.norm", seen, 1e-6)
    text = "blip.text_encoder"
    x = state[f"{text}.embeddings.word_embeddings.weight"][tokens]
    x = x + state[f"{text}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(f"{text}.embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            source = x if attention == "attention" else seen
            name = f"{layer}.{attention}.self"
            read = attend(linear(f"{name}.query", x), linear(f"{name}.key", source), linear(f"{name}.value", source))
            read = linear(f"{layer}.{attention}.output.dense", read)
            x = norm(f"{layer}.{attention}.output.LayerNorm", x + read, 1e-12)
        wide = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", wide), 1e-12)
    reward = x[0]
    for number, _, _ in HEAD:
        reward = linear(f"mlp.layers.{number}", reward)
    return (reward.item() - 0.16717362830052426) / 1.0333394966054072


def test_rewards_are_those_of_the_layers_written_out(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = list(rng.integers(256, size=(2, 32, 32, 3), dtype=np.uint8))
    found = ImageReward(folder).score(images, ["a dog", "two red cats"])
    # [CLS] a dog [SEP]; [CLS] two red cat ##s [SEP]
    expected = [by_hand(published(), images[0], [2, 5, 6, 3]), by_hand(published(), images[1], [2, 10, 8, 7, 9, 3])]
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_batches_and_sizes_do_not_matter(folder: Path, images: list[Image.Image]) -> None:
    metric: Metric = ImageReward(folder, batch_size=3)
    scores = metric.score(images, PROMPTS)
    alone = [metric.score([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    large = [image.resize((80, 80), Image.Resampling.NEAREST) for image in images]
    assert metric.score([*images, large[0]], [*PROMPTS, PROMPTS[0]]).shape == (5,)
    assert scores.dtype == np.float64
    assert np.ptp(scores) > 1e-3
    assert metric.score([], []).shape == (0,)
    assert metric.score(images[:1], ["a cat " * 99])[0] == pytest.approx(metric.score(images[:1], [PROMPTS[2]])[0])
    with pytest.raises(ValueError, match="4 images with 3 prompts"):
        metric.score(images, PROMPTS[:3])


def test_a_hub_id_brings_its_vocabulary(hub: Path, folder: Path, images: list[Image.Image]) -> None:
    in_hub(hub, "zai-org/ImageReward", folder, "ImageReward.pt", "med_config.json")
    with pytest.raises(FileNotFoundError, match="'google-bert/bert-base-uncased' is not a folder here"):
        ImageReward("zai-org/ImageReward")
    in_hub(hub, "google-bert/bert-base-uncased", folder, "vocab.txt")
    scores = ImageReward("zai-org/ImageReward").score(images, PROMPTS)
    np.testing.assert_allclose(scores, ImageReward(folder).score(images, PROMPTS))


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json", "vocab.txt"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        ImageReward(copy)


@pytest.mark.parametrize(
    ("changed", "config", "text"),
    [
        pytest.param({"mlp.layers.4.bias": None}, {}, "ImageReward.pt does not fit", id="a-tensor-less"),
        pytest.param({"blip.visual_encoder.pos_embed": None}, {}, "is not ImageReward's", id="no-vision-tower"),
        pytest.param({"blip.visual_encoder.head.bias": torch.zeros(1)}, {}, "does not fit", id="an-unknown-part"),
        pytest.param({}, {"hidden_size": 48}, "does not fit", id="a-config-of-another-model"),
        pytest.param({}, {"hidden_act": None}, "is not ImageReward's", id="a-config-without-a-key"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, changed: dict[str, Any], config: dict[str, Any], text: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    state = {key: value for key, value in {**published(), **changed}.items() if value is not None}
    torch.save(state, copy / "ImageReward.pt")
    fields = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (copy / "med_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=text):
        ImageReward(copy)
