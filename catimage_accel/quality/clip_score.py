"""CLIPScore: how well an image fits its caption, as a CLIP model sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catimage_accel.quality.metric import check_pairs, to_rgb
from catimage_accel.quality.sources import digest, model_folder
from catimage_accel.routing.table import check_prompts

if TYPE_CHECKING:
    import torch

    from catimage_accel.quality.metric import ImageLike


class CLIPScore:
    """``max(cos(image, caption), 0)`` of a CLIP model's two embeddings, in [0, 1], higher is better.

    As in Hessel et al., "CLIPScore" (arXiv 2104.08718), without its factor 2.5; ``torchmetrics`` reports 100 times
    this. Values compare only under one model. ``model`` is a transformers CLIP folder (weights, tokenizer, image
    processor) or, where there is no such folder, a hub id such as "openai/clip-vit-large-patch14", which is then
    downloaded; of a folder nothing is. Captions are cut at the model's length. FileNotFoundError without the model.
    """

    name = "clip_score"
    higher_is_better = True
    range = (0.0, 1.0)

    def __init__(self, model: str | Path, *, device: str | torch.device | None = None, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self._folder = folder = _clip_folder(model)
        # PIL's resizing rather than torchvision's where that is installed: scores are to be the same everywhere.
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.batch_size = batch_size
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, weights_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"{folder} is no whole transformers CLIP model: {reason}") from None
        self._model = self._model.float().eval().to(device or "cpu")

    @cached_property
    def digest(self) -> str:
        """The sha256 of the weights."""
        return digest(list(self._folder.glob("*.safetensors")) or self._folder.glob("pytorch_model*.bin"))

    @property
    def dimensions(self) -> int:
        """The length of an embedding."""
        return int(self._model.config.projection_dim)

    def score(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> np.ndarray:
        """(n,) float64 in [0, 1]; ValueError for unlike lengths or something that is no image."""
        check_pairs(images, prompts)
        cosines = (self.embed_images(images) * self.embed_texts(prompts)).sum(axis=1)
        return np.clip(cosines, 0, 1)

    def embed_images(self, images: Sequence[ImageLike]) -> np.ndarray:
        """(n, dimensions) float64 of length 1."""
        arrays = to_rgb(images)

        def features(rows: slice) -> torch.Tensor:
            pixels = self._processor(arrays[rows], return_tensors="pt")["pixel_values"]
            return self._model.get_image_features(pixels.to(self._model.device)).pooler_output

        return self._embed(len(arrays), features)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimensions) float64 of length 1."""
        check_prompts(texts)
        most = min(self._model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

        def features(rows: slice) -> torch.Tensor:
            tokens = self._tokenizer(
                list(texts[rows]), padding="longest", max_length=most, truncation=True, return_tensors="pt"
            ).to(self._model.device)
            return self._model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output

        return self._embed(len(texts), features)

    def _embed(self, number: int, features: Callable[[slice], torch.Tensor]) -> np.ndarray:
        import torch

        rows = np.zeros((number, self.dimensions))
        with torch.no_grad():
            for part in _slices(number, self.batch_size):
                rows[part] = features(part).double().cpu().numpy()
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def caption_accuracy(
    judge: CLIPScore, images: Sequence[ImageLike], captions: Sequence[str], near_misses: Sequence[Sequence[str]]
) -> float:
    """The share of images, in [0, 1], for which the true caption scores above all of its near misses.

    ``near_misses`` is (n, m): for every image m false captions. Cosines are compared before they are cut at 0; a tie
    counts as a miss. By chance 1 / (m + 1). ValueError for no images, unlike lengths, or an image without near
    misses.
    """
    return float(picks_caption(judge, images, captions, near_misses).mean())


def picks_caption(
    judge: CLIPScore, images: Sequence[ImageLike], captions: Sequence[str], near_misses: Sequence[Sequence[str]]
) -> np.ndarray:
    """For each image whether its true caption scores above all of its near misses, bool (n,); see caption_accuracy."""
    check_pairs(images, captions)
    sizes = {len(misses) for misses in near_misses}
    if len(near_misses) != len(images) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{len(images)} images with {len(near_misses)} lists of near misses of the lengths {sorted(sizes)}, "
            f"expected one list an image, all of one length >= 1"
        )
    texts = [text for true, misses in zip(captions, near_misses, strict=True) for text in (true, *misses)]
    embedded = judge.embed_texts(texts).reshape(len(images), 1 + max(sizes), -1)
    cosines = np.einsum("nd,nmd->nm", judge.embed_images(images), embedded)
    picked: np.ndarray = cosines[:, 0] > cosines[:, 1:].max(axis=1)
    return picked


def _clip_folder(model: str | Path) -> Path:
    accepted = "a transformers CLIP model: its folder or a hub id"
    folder = model_folder(model, accepted, ["*.json", "*.txt", "*.safetensors"])
    if Path(model).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    # Only if there is nothing better: what is in a .bin is not run, but one as large again would be downloaded.
    return model_folder(model, accepted, ["pytorch_model*.bin"])


def _slices(number: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, number, size))
