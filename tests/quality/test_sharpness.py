"""Sharpness against a plain convolution, and the order that an eye would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from catimage_accel.quality import Metric, Sharpness


def noise(height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def test_it_is_the_variance_of_the_laplacian() -> None:
    image = noise()
    grey = torch.from_numpy(image @ np.array([0.299, 0.587, 0.114]))
    padded = torch.nn.functional.pad(grey[None, None], (1, 1, 1, 1), mode="reflect")
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    expected = torch.nn.functional.conv2d(padded, kernel[None, None]).var(correction=0).item()
    assert Sharpness().score([image], [""])[0] == pytest.approx(expected)


def test_blur_lowers_it_and_a_flat_image_has_none() -> None:
    image = Image.fromarray(noise(64, 64))
    metric: Metric = Sharpness()
    blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2)]
    flat = np.full((8, 8, 3), 200, dtype=np.uint8)
    scores = metric.score([image, *blurred, flat], [""] * 4)
    assert (np.diff(scores) < 0).all()
    assert scores[-1] == pytest.approx(0, abs=1e-12)
    assert metric.score([], []).shape == (0,)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="image 1 has 5x1 pixels, expected at least 2x2"):
        Sharpness().score([noise(), noise(1, 5)], ["", ""])
    with pytest.raises(ValueError, match=r"image 0 is 'cat\.png'"):
        Sharpness().score(["cat.png"], [""])  # type: ignore[list-item]
