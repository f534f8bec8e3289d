"""CLIPScore and caption accuracy with a small random CLIP in a transformers folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import in_hub
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from catimage_accel.quality import CLIPScore, Metric, caption_accuracy

CAPTIONS = ["a dog on a red background", "two lemons on blue", "a crown above a bear", "a cat"]


@pytest.fixture(scope="module")
def judge(clip_folder: Path) -> CLIPScore:
    return CLIPScore(clip_folder, batch_size=3)


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
    with pytest.raises(ValueError, match="batch_size is 0"):
        CLIPScore(tmp_path, batch_size=0)


def test_a_hub_id_is_loaded_from_the_hubs_cache(
    hub: Path, clip_folder: Path, judge: CLIPScore, images: list[Image.Image]
) -> None:
    in_hub(hub, "owner/clip", clip_folder)
    assert CLIPScore("owner/clip").score(images, CAPTIONS) == pytest.approx(judge.score(images, CAPTIONS), abs=1e-6)


def test_weights_without_safetensors_are_read_from_the_bin_file(
    hub: Path, clip_folder: Path, judge: CLIPScore, images: list[Image.Image]
) -> None:
    snapshot = in_hub(hub, "owner/clip", clip_folder)
    weights = CLIPModel.from_pretrained(clip_folder).state_dict()
    torch.save(weights, snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    before = CLIPScore("owner/clip").digest
    assert CLIPScore("owner/clip").score(images, CAPTIONS) == pytest.approx(judge.score(images, CAPTIONS), abs=1e-6)
    torch.save({name: 2 * tensor for name, tensor in weights.items()}, snapshot / "pytorch_model.bin")
    assert len({CLIPScore("owner/clip").digest, before, judge.digest}) == 3, "weights are told apart"


def test_a_folder_wins_over_the_hub(
    hub: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub(hub, "owner/clip", clip_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "clip").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="owner/clip is no whole transformers CLIP model"):
        CLIPScore("owner/clip")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        pytest.param(Path("owner/clip"), "no folder owner/clip, expected a transformers CLIP model", id="a-path"),
        pytest.param("./owner/clip", "no folder ./owner/clip, expected a transformers", id="no-hub-id"),
        pytest.param("owner/clip", "'owner/clip' is not a folder here and could not be had from", id="not-in-reach"),
    ],
)
def test_a_model_that_is_not_there_is_named(hub: Path, model: str | Path, text: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        CLIPScore(model)
    assert str(raised.value).startswith(text)
    assert "its folder or a hub id" in str(raised.value)
