"""What every quality metric offers, and how it reads images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from catimage_accel.routing.table import check_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = Image | np.ndarray


class Metric(Protocol):
    """A number for each pair of an image and the prompt that it was drawn for.

    ``name`` is the metric's name in score files, ``range`` the lowest and highest value possible. ``score`` works in
    batches and gives (n,) float64; images are PIL images or (height, width, 3) uint8 arrays, of any sizes. Lists of
    unlike length, and anything else among the images, are a ValueError naming the position.

    A metric with a model may also have ``digest``, a string that differs between models: scores by unlike models
    are then kept from mixing in one score file.
    """

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def score(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> np.ndarray: ...


def check_pairs(images: Sequence[ImageLike], prompts: Sequence[str]) -> None:
    """ValueError unless every image has its prompt."""
    check_prompts(prompts)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts, expected one prompt an image")


def eight_bit(picture: Image) -> Image:
    """``picture``, one of 16-bit greys scaled to 8 bits, which PIL itself cuts off at 255.

    ValueError for numbers whose black and white are not known: floats and 32-bit integers.
    """
    from PIL.Image import fromarray

    if picture.mode.startswith("I;16"):
        return fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        kind = "floats" if picture.mode == "F" else "32-bit integers"
        raise ValueError(f"a picture of {kind}, whose black and white are not known; accepted: 8 or 16 bits a channel")
    return picture


def to_rgb(images: Sequence[ImageLike]) -> list[np.ndarray]:
    """The images as (height, width, 3) uint8 arrays; PIL images of other modes are converted."""
    from PIL.Image import Image

    arrays = []
    for position, image in enumerate(images):
        array = image
        if isinstance(image, Image):
            try:
                picture = eight_bit(image)
            except ValueError as error:
                raise ValueError(f"image {position} is {error}") from None
            array = np.asarray(picture.convert("RGB"))
        if not (
            isinstance(array, np.ndarray)
            and array.dtype == np.uint8
            and array.ndim == 3
            and array.shape[2] == 3
            and array.size
        ):
            found = f"{array.dtype} array of shape {array.shape}" if isinstance(array, np.ndarray) else repr(image)
            raise ValueError(f"image {position} is {found}, expected a PIL image or a (height, width, 3) uint8 array")
        arrays.append(array)
    return arrays
