"""ImageReward: how people would rank an image among others for its prompt, as a BLIP-based reward model sees it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from catimage_accel.quality.metric import check_pairs, to_rgb
from catimage_accel.quality.sources import digest, model_folder, read_tensors
from catimage_accel.storage import read_json

if TYPE_CHECKING:
    import torch

    from catimage_accel.quality.metric import ImageLike

WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE = "ImageReward.pt", "med_config.json", "vocab.txt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STANDARD_DEVIATION = 0.16717362830052426, 1.0333394966054072
_MOST_TOKENS = 35
_HEAD_WIDTH = 64
_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
# The released names of the vision tower's parts, and transformers'.
_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)


class ImageReward:
    """A reward for image and prompt, about -2 to 2 and not bounded, 0 being average; higher is better.

    Xu et al., "ImageReward" (arXiv 2304.05977): BLIP's text encoder reads the prompt (cut at 35 tokens) with an eye on
    the image, five Linears turn its first token into a number, which is standardised with the paper's constants.
    ``model`` is a folder with ImageReward.pt (read without running what is in it), med_config.json and the
    vocab.txt of bert-base-uncased, or the hub id "zai-org/ImageReward", which is then downloaded, as is the
    vocabulary. The layers are transformers' BLIP: the package image-reward 1.5 can't be imported beside
    transformers 5. Not measured yet with the published weights. FileNotFoundError for what is missing, ValueError for
    weights that do not fit.
    """

    name = "image_reward"
    higher_is_better = True
    range = (-math.inf, math.inf)

    def __init__(self, model: str | Path, *, device: str | torch.device | None = None, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        folder = model_folder(model, "a folder with ImageReward.pt or a hub id", [WEIGHTS_FILE, CONFIG_FILE])
        vocabulary = folder
        if not Path(model).is_dir() and not (folder / VOCABULARY_FILE).is_file():
            vocabulary = model_folder(TOKENIZER, "its vocabulary", [VOCABULARY_FILE])
        for place, name in ((folder, WEIGHTS_FILE), (folder, CONFIG_FILE), (vocabulary, VOCABULARY_FILE)):
            if not (place / name).is_file():
                raise FileNotFoundError(
                    f"{place / name} is missing; ImageReward needs {WEIGHTS_FILE}, {CONFIG_FILE} and the "
                    f"{VOCABULARY_FILE} of {TOKENIZER}"
                )
        from transformers import BertTokenizer, CLIPImageProcessorPil

        self.batch_size = batch_size
        self._weights = folder / WEIGHTS_FILE
        self._device = device or "cpu"
        tensors = read_tensors(self._weights)
        self._vision, self._text, self._head = _build(tensors, read_json(folder / CONFIG_FILE), folder)
        for part in (self._vision, self._text, self._head):
            part.float().eval().to(self._device)
        self._tokenizer = BertTokenizer.from_pretrained(vocabulary, local_files_only=True)
        side = self._vision.config.image_size
        # CLIP's mean and deviation, bicubic and cropped to the middle, are what the model was trained with.
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @cached_property
    def digest(self) -> str:
        """The sha256 of the weights."""
        return digest([self._weights])

    def score(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> np.ndarray:
        """(n,) float64; ValueError for unlike lengths or something that is no image."""
        check_pairs(images, prompts)
        arrays = to_rgb(images)
        rewards = np.zeros(len(arrays))
        for start in range(0, len(arrays), self.batch_size):
            rows = slice(start, start + self.batch_size)
            rewards[rows] = self._rewards(arrays[rows], list(prompts[rows]))
        return (rewards - MEAN) / STANDARD_DEVIATION

    def _rewards(self, images: list[np.ndarray], prompts: list[str]) -> np.ndarray:
        import torch

        pixels = self._processor(images, return_tensors="pt")["pixel_values"].to(self._device)
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        ).to(self._device)
        with torch.no_grad():
            seen = self._vision(pixels).last_hidden_state
            read = self._text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
            return self._head(read[:, 0])[:, 0].double().cpu().numpy()


def _build(tensors: Mapping[str, torch.Tensor], config: Any, folder: Path) -> tuple[Any, Any, Any]:
    """The vision tower, the text encoder and the head, with ``tensors`` in them; ValueError if they do not fit."""
    from torch import nn
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    try:
        patches = tensors["blip.visual_encoder.patch_embed.proj.weight"]
        places = tensors["blip.visual_encoder.pos_embed"].shape[1] - 1
        width, patch = patches.shape[0], patches.shape[-1]
        vision = BlipVisionConfig(
            hidden_size=width, intermediate_size=len(tensors["blip.visual_encoder.blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=1 + max(_numbers(tensors, r"blip\.visual_encoder\.blocks\.(\d+)\.")),
            num_attention_heads=width // _HEAD_WIDTH, image_size=math.isqrt(places) * patch, patch_size=patch,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        text = BlipTextConfig(**{key: config[key] for key in _CONFIG_KEYS}, encoder_hidden_size=width)
        numbers = _numbers(tensors, r"mlp\.layers\.(\d+)\.weight")
        linears = [tensors[f"mlp.layers.{number}.weight"] for number in numbers]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {CONFIG_FILE} or {WEIGHTS_FILE} is not ImageReward's: {error!r}") from None
    head = nn.Sequential(*(nn.Linear(linear.shape[1], linear.shape[0]) for linear in linears))
    parts = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), head
    named: tuple[dict[str, torch.Tensor], ...] = ({}, {}, {})
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            named[0][_vision_name(name.removeprefix("blip.visual_encoder."))] = tensor
        elif name.startswith("blip.text_encoder.") and not name.endswith(".position_ids"):
            named[1][name.removeprefix("blip.text_encoder.")] = tensor
        elif match := re.fullmatch(r"mlp\.layers\.(\d+)\.(weight|bias)", name):
            # The released head counts its dropouts, too.
            position = numbers.index(int(match[1])) if int(match[1]) in numbers else len(numbers)
            named[2][f"{position}.{match[2]}"] = tensor
    for part, state in zip(parts, named, strict=True):
        try:
            part.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit: {' '.join(str(error).split())[:300]}") from None
    return parts


def _numbers(names: Mapping[str, torch.Tensor], pattern: str) -> list[int]:
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern)
    return sorted(found)


def _vision_name(name: str) -> str:
    for pattern, ours in _VISION_NAMES:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return name
