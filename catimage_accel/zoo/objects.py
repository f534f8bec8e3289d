"""The zoo's vocabulary: 108 nouns and the Noto Color Emoji picture of each.

The pictures ship as one atlas, ``data/objects.png``, so that nothing here needs a font installed.
``build_atlas`` is the code that drew it from Debian's ``fonts-noto-color-emoji`` (SIL OFL 1.1, see
``data/OFL.txt``).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 72
COLUMNS = 12

CODEPOINTS: dict[str, int] = {
    "dog": 0x1F436, "cat": 0x1F431, "mouse": 0x1F42D, "rabbit": 0x1F430, "fox": 0x1F98A, "bear": 0x1F43B,
    "panda": 0x1F43C, "koala": 0x1F428, "tiger": 0x1F42F, "lion": 0x1F981, "cow": 0x1F42E, "pig": 0x1F437,
    "frog": 0x1F438, "monkey": 0x1F435, "chick": 0x1F425, "penguin": 0x1F427, "owl": 0x1F989,
    "unicorn": 0x1F984, "bee": 0x1F41D, "butterfly": 0x1F98B, "snail": 0x1F40C, "ladybug": 0x1F41E,
    "turtle": 0x1F422, "octopus": 0x1F419, "crab": 0x1F980, "fish": 0x1F41F, "dolphin": 0x1F42C,
    "whale": 0x1F433, "elephant": 0x1F418, "lemon": 0x1F34B, "apple": 0x1F34E, "banana": 0x1F34C,
    "strawberry": 0x1F353, "pear": 0x1F350, "peach": 0x1F351, "pineapple": 0x1F34D, "watermelon": 0x1F349,
    "kiwi": 0x1F95D, "tomato": 0x1F345, "avocado": 0x1F951, "carrot": 0x1F955, "mushroom": 0x1F344,
    "eggplant": 0x1F346, "pretzel": 0x1F968, "burger": 0x1F354, "pizza": 0x1F355, "cookie": 0x1F36A,
    "donut": 0x1F369, "cake": 0x1F382, "cupcake": 0x1F9C1, "lollipop": 0x1F36D, "crown": 0x1F451,
    "hat": 0x1F3A9, "shoe": 0x1F45F, "boot": 0x1F462, "backpack": 0x1F392, "umbrella": 0x2602,
    "ring": 0x1F48D, "diamond": 0x1F48E, "guitar": 0x1F3B8, "drum": 0x1F941, "trumpet": 0x1F3BA,
    "bell": 0x1F514, "clock": 0x23F0, "key": 0x1F511, "lock": 0x1F512, "hammer": 0x1F528, "book": 0x1F4D5,
    "pencil": 0x270F, "camera": 0x1F4F7, "phone": 0x1F4F1, "television": 0x1F4FA, "candle": 0x1F56F,
    "balloon": 0x1F388, "gift": 0x1F381, "trophy": 0x1F3C6, "basketball": 0x1F3C0, "football": 0x26BD,
    "kite": 0x1FA81, "rocket": 0x1F680, "car": 0x1F697, "bus": 0x1F68C, "tractor": 0x1F69C,
    "bicycle": 0x1F6B2, "sailboat": 0x26F5, "airplane": 0x2708, "helicopter": 0x1F681, "anchor": 0x2693,
    "house": 0x1F3E0, "castle": 0x1F3F0, "tent": 0x26FA, "tree": 0x1F333, "cactus": 0x1F335,
    "tulip": 0x1F337, "rose": 0x1F339, "sunflower": 0x1F33B, "star": 0x2B50, "moon": 0x1F319, "sun": 0x2600,
    "cloud": 0x2601, "snowman": 0x26C4, "heart": 0x2764, "robot": 0x1F916, "ghost": 0x1F47B,
    "pumpkin": 0x1F383, "magnet": 0x1F9F2, "wrench": 0x1F527, "globe": 0x1F30D,
}  # fmt: skip

NOUNS: tuple[str, ...] = tuple(CODEPOINTS)

IRREGULAR_PLURALS = {
    "mouse": "mice", "fox": "foxes", "butterfly": "butterflies", "octopus": "octopuses", "fish": "fish",
    "strawberry": "strawberries", "peach": "peaches", "tomato": "tomatoes", "bus": "buses",
    "cactus": "cactuses", "trophy": "trophies",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of one of ``NOUNS``."""
    return IRREGULAR_PLURALS.get(noun, noun + "s")


def article(word: str) -> str:
    """``a`` or ``an``, by the sound that ``word`` (one of ours) begins with."""
    return "a" if word[0] not in "aeiou" or word.startswith("uni") else "an"


@lru_cache(maxsize=1)
def object_pictures() -> dict[str, Image.Image]:
    """Every noun's RGBA picture, cropped, its longer side ``CELL`` pixels.

    Raises FileNotFoundError when the package data is missing.
    """
    resource = files("catimage_accel.zoo") / "data" / "objects.png"
    if not resource.is_file():
        raise FileNotFoundError(f"{resource} is missing: reinstall catimage-accel, its package data is incomplete")
    with resource.open("rb") as stream:
        atlas = Image.open(stream).convert("RGBA")
    pictures = {}
    for index, noun in enumerate(NOUNS):
        left, top = (index % COLUMNS) * CELL, (index // COLUMNS) * CELL
        cell = atlas.crop((left, top, left + CELL, top + CELL))
        pictures[noun] = cell.crop(cell.getbbox())
    return pictures


def build_atlas(font: Path, out: Path) -> None:
    """Draw the atlas from ``NotoColorEmoji.ttf``: ``COLUMNS`` cells a row, in the order of ``NOUNS``."""
    bitmap_size = 109  # the only size at which FreeType reads this font's bitmaps
    face = ImageFont.truetype(str(font), bitmap_size)
    rows = -(-len(NOUNS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, (noun, codepoint) in enumerate(CODEPOINTS.items()):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), chr(codepoint), font=face, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"{font} draws nothing for {noun!r} (U+{codepoint:X}): pass NotoColorEmoji.ttf")
        picture = canvas.crop(box)
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        left = (index % COLUMNS) * CELL + (CELL - picture.width) // 2
        top = (index // COLUMNS) * CELL + (CELL - picture.height) // 2
        atlas.paste(picture, (left, top))
    atlas.save(out, optimize=True)
