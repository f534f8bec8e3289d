"""Contact sheets: everything legible, whatever the prompts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from catimage_accel.contact_sheet import MARGIN, contact_sheet

RED = Image.new("RGB", (64, 64), (200, 0, 0))


def text_rows(sheet: Image.Image) -> int:
    """Rows of pixels beneath the pictures with something dark in them."""
    beneath = np.asarray(sheet.convert("L"))[MARGIN + 256 :]
    return int((beneath < 128).any(axis=1).sum())


def test_small_pictures_are_enlarged_and_stand_in_rows() -> None:
    sheet = contact_sheet([RED] * 5, ["a dog"] * 5, ["cheap"] * 5, columns=3)
    assert sheet.width == MARGIN + 3 * (256 + MARGIN)
    assert sheet.height > 2 * 256
    assert sheet.getpixel((MARGIN + 128, MARGIN + 128)) == (200, 0, 0)
    assert sheet.getpixel((MARGIN + 2 * (256 + MARGIN) + 128, sheet.height - 100)) != (200, 0, 0)


def test_large_pictures_keep_their_size() -> None:
    assert contact_sheet([Image.new("RGB", (512, 300))], ["a"], ["b"]).width == 512 + 2 * MARGIN


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("", id="empty"),
        pytest.param("a dog " * 400, id="long-text-is-cut"),
        pytest.param("x" * 5000, id="long-word-is-broken"),
        pytest.param("日本語 \u202e é 🐶", id="letters-the-font-lacks"),
    ],
)
def test_any_prompt_fits(prompt: str) -> None:
    sheet = contact_sheet([RED], [prompt], ["one\ntwo"])
    right_margin = np.asarray(sheet.convert("L"))[:, -MARGIN + 2 :]
    assert right_margin.min() > 240
    assert sheet.height < 256 + 300


def test_line_breaks_of_notes_are_kept() -> None:
    assert text_rows(contact_sheet([RED], ["a"], ["one\ntwo"])) > text_rows(contact_sheet([RED], ["a"], ["one two"]))


@pytest.mark.parametrize(("pictures", "prompts"), [([], []), ([RED], [])], ids=["nothing", "a-prompt-short"])
def test_unlike_numbers_are_refused(pictures: list[Image.Image], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="accepted: the same number of each"):
        contact_sheet(pictures, prompts, prompts)
