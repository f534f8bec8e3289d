"""A contact sheet: every picture with its prompt and its route beneath."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 256
MARGIN = 16
PROMPT_SIZE, ROUTE_SIZE = 17, 14
LINE_GAP = 4
MAX_PROMPT_LINES, MAX_NOTE_LINES = 5, 4
PAPER, INK, FAINT = (252, 252, 250), (24, 24, 27), (82, 88, 99)


def contact_sheet(
    pictures: Sequence[Image.Image], prompts: Sequence[str], notes: Sequence[str], columns: int = 4
) -> Image.Image:
    """One RGB image of all ``pictures`` in rows of ``columns``, in order.

    Pictures under 256 pixels a side are enlarged by a whole factor (Lanczos), so that 64-pixel ones can be judged at
    normal zoom. ``prompts`` are wrapped and, after five lines, cut with an ellipsis; ``notes`` (the routes) stand
    beneath, their line breaks kept. ValueError if the three differ in length or are empty.
    """
    if not pictures or not len(pictures) == len(prompts) == len(notes):
        raise ValueError(
            f"got {len(pictures)} pictures, {len(prompts)} prompts and {len(notes)} notes; "
            "accepted: the same number of each, at least 1"
        )
    prompt_font, note_font = ImageFont.load_default(PROMPT_SIZE), ImageFont.load_default(ROUTE_SIZE)
    enlarged = [_enlarged(picture) for picture in pictures]
    width = max(picture.width for picture in enlarged)
    height = max(picture.height for picture in enlarged)
    wrapped = [
        (_wrap(prompt, prompt_font, width, MAX_PROMPT_LINES), _wrap(note, note_font, width, MAX_NOTE_LINES))
        for prompt, note in zip(prompts, notes, strict=True)
    ]
    columns = min(columns, len(pictures))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    text_heights = [max(_text_height(*wrapped[index]) for index in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (MARGIN + columns * (width + MARGIN), MARGIN + sum(height + text + MARGIN for text in text_heights)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(enlarged[index], (left, top))
            y = top + height + LINE_GAP
            for lines, font, size, colour in (
                (wrapped[index][0], prompt_font, PROMPT_SIZE, INK),
                (wrapped[index][1], note_font, ROUTE_SIZE, FAINT),
            ):
                for line in lines:
                    draw.text((left, y), line, font=font, fill=colour)
                    y += size + LINE_GAP
        top += height + text_height + MARGIN
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, -(-MIN_SIDE // min(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _text_height(prompt: Sequence[str], note: Sequence[str]) -> int:
    return 2 * LINE_GAP + len(prompt) * (PROMPT_SIZE + LINE_GAP) + len(note) * (ROUTE_SIZE + LINE_GAP)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of at most ``width`` pixels; a word too long for a line is broken."""
    lines: list[str] = []
    # No letter is narrower than a pixel: what is beyond this many can't be seen, and would take long to measure.
    for paragraph in text[: most * width].splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while len(line) > 1 and font.getlength(line) > width and len(lines) <= most:
                fits = 1
                while font.getlength(line[: fits + 1]) <= width:
                    fits += 1
                lines.append(line[:fits])
                line = line[fits:]
        if line:
            lines.append(line)
    if len(lines) > most:
        lines = lines[:most]
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines
