"""Pictures to be had for a while under names that nobody can guess."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catimage_accel.serve import pictures
from catimage_accel.serve.pictures import PictureStore, encode


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_files_are_what_they_are_called(output_format: pictures.OutputFormat) -> None:
    pixels = np.full((16, 24, 3), 128, dtype=np.uint8)
    image = Image.open(io.BytesIO(encode(pixels, output_format)))
    assert (image.format or "").lower() == output_format
    assert image.size == (24, 16)


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels, "png")))), pixels)


def test_only_names_that_were_given_out_are_found(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"not yours")
    folder = tmp_path / "pictures"
    folder.mkdir()
    store = PictureStore(folder)
    name = store.add(b"mine", "png")
    found = store.find(name)
    assert found is not None
    assert found.read_bytes() == b"mine"
    for wrong in ("../secret.png", str(tmp_path / "secret.png"), "", name.upper(), f"./{name}"):
        assert store.find(wrong) is None


def test_the_oldest_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, max_bytes=100)
    names = [store.add(bytes(40), "png") for _ in range(4)]
    assert [store.find(name) is not None for name in names] == [False, False, True, True]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_picture_larger_than_all_there_is_room_for_is_kept_alone(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, max_bytes=100)
    store.add(bytes(40), "png")
    assert store.find(store.add(bytes(400), "png")) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_after_its_time_a_picture_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pictures.time, "monotonic", lambda: now[0])
    store = PictureStore(tmp_path, seconds=60)
    name = store.add(b"x", "png")
    now[0] += 61
    assert store.find(name) is None
    assert not list(tmp_path.iterdir())


class FullDisk:
    """Of ``room`` bytes under ``folder``: a file that is larger than what is left is written as far as it goes."""

    def __init__(self, folder: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.room = folder, room
        write = Path.write_bytes

        def write_bytes(path: Path, data: bytes) -> int:
            left = self.room - sum(self.sizes())
            write(path, data[:left])
            if len(data) > left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.folder.iterdir()]


def test_on_a_full_disk_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path, 100, monkeypatch)
    store = PictureStore(tmp_path)
    names = [store.add(bytes(40), "png") for _ in range(4)]
    assert [store.find(name) is not None for name in names] == [False, False, True, True]
    assert disk.sizes() == [40, 40]


def test_what_no_disk_has_room_for_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path, 100, monkeypatch)
    store = PictureStore(tmp_path)
    store.add(bytes(40), "png")
    with pytest.raises(OSError, match="No space left"):
        store.add(bytes(101), "png")
    assert disk.sizes() == []
    assert store.find(store.add(bytes(60), "png")) is not None
