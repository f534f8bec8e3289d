"""CLIPScore and caption accuracy with a small random CLIP in a transformers folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from catimage_accel.quality import CLIPScore, Metric, caption_accuracy
from catimage_accel.zoo.training.tokenizer import build_tokenizer

CAPTIONS = ["a dog on a red background", "two lemons on blue", "a crown above a bear", "a cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(captions=100)
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(
        CLIPConfig(
            text_config=part | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24},
            vision_config=part | {"image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(clip_folder: Path) -> CLIPScore:
    return CLIPScore(clip_folder, batch_size=3)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)) for _ in CAPTIONS]


def test_score_is_the_models_own_cosine(clip_folder: Path, judge: Metric, images: list[Image.Image]) -> None:
    scores = judge.score(images, CAPTIONS)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images, return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        cosine = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    expected = (cosine.image_embeds * cosine.text_embeds).sum(dim=1).clamp(min=0).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.dtype == np.float64
    assert (judge.name, judge.higher_is_better, judge.range) == ("clip_score", True, (0.0, 1.0))
    assert ((scores >= 0) & (scores <= 1)).all()


def test_batches_arrays_and_modes_do_not_matter(judge: CLIPScore, images: list[Image.Image]) -> None:
    scores = judge.score(images, CAPTIONS)
    alone = [judge.score([image], [caption])[0] for image, caption in zip(images, CAPTIONS, strict=True)]
    np.testing.assert_allclose(alone, scores, atol=1e-6)
    np.testing.assert_allclose(judge.score([np.asarray(image) for image in images], CAPTIONS), scores, atol=1e-9)
    np.testing.assert_allclose(judge.score([image.convert("RGBA") for image in images], CAPTIONS), scores, atol=1e-9)
    assert judge.score([], []).shape == (0,)
    assert judge.score(images[:1], ["a dog and a cat " * 100]).shape == (1,), "captions over the limit are cut"


def test_caption_accuracy_counts_where_the_true_caption_wins(judge: CLIPScore, images: list[Image.Image]) -> None:
    cosines = judge.embed_images(images) @ judge.embed_texts(CAPTIONS).T
    order = np.argsort(-cosines, axis=1)
    best = [CAPTIONS[row[0]] for row in order]
    rest = [[CAPTIONS[i] for i in row[1:]] for row in order]
    assert caption_accuracy(judge, images, best, rest) == 1
    swapped = [[best[i], *rest[i][1:]] for i in range(2)]
    assert caption_accuracy(judge, images, [rest[0][0], rest[1][0], *best[2:]], [*swapped, *rest[2:]]) == 0.5
    assert caption_accuracy(judge, images, best, [[caption] for caption in best]) == 0, "a tie is a miss"


def test_wrong_input_is_named(judge: CLIPScore, images: list[Image.Image], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 images with 3 prompts"):
        judge.score(images, CAPTIONS[:3])
    with pytest.raises(ValueError, match=r"image 0 is float64 array of shape \(4, 4, 3\)"):
        judge.score([np.zeros((4, 4, 3))], ["a cat"])
    with pytest.raises(ValueError, match=r"4 images with 4 lists of near misses of the lengths \[1, 2\]"):
        caption_accuracy(judge, images, CAPTIONS, [["a"], ["a"], ["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="0 images"):
        caption_accuracy(judge, [], [], [])
    with pytest.raises(FileNotFoundError, match="expected a transformers CLIP model"):
        CLIPScore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="batch_size is 0"):
        CLIPScore(tmp_path, batch_size=0)
