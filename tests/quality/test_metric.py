"""How metrics read images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from catimage_accel.quality.metric import eight_bit, to_rgb

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_of_8_bits_are_as_pil_converts_them(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    (found,) = to_rgb([picture])
    assert np.array_equal(found, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["<u2", ">u2"], ids=["little-endian", "big-endian"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    """PIL alone would make white of all above 255."""
    picture = Image.fromarray(RAMP.astype(kind))
    assert picture.mode.startswith("I;16")
    (found,) = to_rgb([picture])
    assert np.array_equal(found, np.repeat(np.round(RAMP / 257).astype(np.uint8)[..., None], 3, axis=2))
    assert eight_bit(picture).mode == "L"


@pytest.mark.parametrize(
    ("mode", "told"),
    [("F", "image 1 is a picture of floats, .*; accepted: 8 or 16 bits"), ("I", "image 1 is a picture of 32-bit")],
)
def test_numbers_whose_range_is_not_known_are_refused(mode: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        to_rgb([Image.new("RGB", (8, 8)), Image.new(mode, (8, 8))])
