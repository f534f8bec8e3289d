"""Text files that are read line by line: prompts, and captions of pictures."""

from __future__ import annotations

from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def text_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers; ValueError naming one that is none.

    They end at line feeds alone: other ends that Unicode knows, such as U+2028, may be part of a caption.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not UTF-8; accepted: text in UTF-8") from None
        if text:
            lines.append((number, text))
    return lines
