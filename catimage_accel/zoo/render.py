"""Draw a Scene as pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from catimage_accel.zoo.objects import object_pictures
from catimage_accel.zoo.scenes import BACKGROUNDS, IMAGE_SIZE, PlacedObject, Scene

TEXTURE_DEPTH = 13  # 8-bit levels; faint, so that a background keeps the colour its caption names


def render(scene: Scene) -> np.ndarray:
    """The scene's picture: uint8 (64, 64, 3), RGB."""
    canvas = Image.fromarray(_background(scene))
    for placed in scene.objects:
        _paste(canvas, placed)
    return np.asarray(canvas)


def _background(scene: Scene) -> np.ndarray:
    colour = np.array(BACKGROUNDS[scene.spec.background], np.float32) + np.array(scene.shade, np.float32)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    px, py = scene.texture_phase
    if scene.texture == "gradient":
        turn = 2 * np.pi * px
        relief = ((x - 31.5) * np.cos(turn) + (y - 31.5) * np.sin(turn)) / 40
    elif scene.texture == "dots":
        relief = 1.6 * (np.hypot((x + 16 * px) % 16 - 8, (y + 16 * py) % 16 - 8) < 4) - 0.6
    elif scene.texture == "stripes":
        across = x + y if px < 0.5 else x - y
        relief = np.sign(np.sin(2 * np.pi * (across / 18 + py)))
    elif scene.texture == "checks":
        relief = np.sign(np.sin(np.pi * (x / 16 + px)) * np.sin(np.pi * (y / 16 + py)))
    else:
        relief = np.zeros_like(x)
    return np.clip(colour + TEXTURE_DEPTH * relief[..., None], 0, 255).astype(np.uint8)


def _paste(canvas: Image.Image, placed: PlacedObject) -> None:
    picture = object_pictures()[placed.noun]
    scale = placed.size / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BOX
    )
    if placed.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(placed.angle, resample=Image.Resampling.BICUBIC, expand=True)
    corner = (round(placed.x - picture.width / 2), round(placed.y - picture.height / 2))
    canvas.paste(picture, corner, picture)
