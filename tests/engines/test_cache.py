"""The engine cache on disk: built once, never half, checked before use, the oldest evicted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import string
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cache_parts import KEY, builds, hidden, never, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from catimage_accel.engines.cache import EngineCache, EngineKey


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_what_was_built_is_there_for_whoever_asks_next(cache: EngineCache) -> None:
    assert cache.find(KEY) is None
    entry = cache.get_or_build(KEY, builds(b"123"))
    assert entry.key == KEY
    assert (entry.folder / "model.onnx").read_bytes() == b"123"
    assert (entry.folder / "weights" / "data.bin").read_bytes() == b"123" * 3
    assert entry.bytes == 12
    assert entry.build_seconds > 0
    assert abs(datetime.now(UTC) - entry.created) < timedelta(minutes=1)
    again = EngineCache(cache.folder).get_or_build(KEY, never)
    assert again.last_used > entry.last_used
    assert replace(again, last_used=entry.last_used) == entry
    assert visible(cache) == [KEY.digest]
    assert cache.entries() == [again]
    assert cache.verify() == []


TEXT = st.text(st.sampled_from(string.ascii_letters + string.digits + " =,.é"), min_size=1, max_size=12)
KEYS = st.builds(
    EngineKey, **{field.name: TEXT for field in fields(EngineKey) if field.name != "options"},
    options=st.dictionaries(TEXT, TEXT, max_size=3).map(lambda options: tuple(options.items())),
)  # fmt: skip


@given(KEYS, KEYS)
@settings(max_examples=200, deadline=None)
def test_digests_differ_exactly_if_keys_do(one: EngineKey, other: EngineKey) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert re.fullmatch("[0-9a-f]{64}", one.digest)
    assert replace(one, options=one.options[::-1]).digest == one.digest
    for field in fields(EngineKey):
        if field.name == "options":
            changed = replace(one, options=(*one.options, ("an option that no key has", "")))
        else:
            changed = replace(one, **{field.name: getattr(one, field.name) + "!"})
        assert changed.digest != one.digest


@given(KEYS)
@settings(max_examples=20, deadline=None)
def test_keys_come_back_from_disk(tmp_path_factory: pytest.TempPathFactory, key: EngineKey) -> None:
    cache = EngineCache(tmp_path_factory.getbasetemp() / "keys")
    entry = cache.get_or_build(key, builds())
    assert entry.key == key
    assert entry.folder.name == key.digest
    assert cache.verify() == []


def test_parts_of_neighbouring_fields_are_not_confused() -> None:
    one, other = ("ab", "c"), ("a", "bc")
    digests = {replace(KEY, runtime=name, runtime_version=version).digest for name, version in (one, other)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("profile", "rows=8\nrows=9", id="two-lines"),
        pytest.param("device", "", id="empty"),
        pytest.param("runtime", "\ud800", id="not-unicode"),
        pytest.param("runtime_version", 10, id="a-number"),
        pytest.param("options", (("a", "1"), ("a", "2")), id="an-option-twice"),
    ],
)
def test_keys_that_could_not_be_kept_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(KEY, **{field: value})


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def flip_a_bit(path: Path) -> None:
    """Size and time of change stay."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edited_and_signed(values: dict[str, Any]) -> None:
    values["key"]["precision"] = "fp32"
    unsigned = {name: value for name, value in values.items() if name != "sha256"}
    values["sha256"] = hashlib.sha256(json.dumps(unsigned, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(lambda at: os.truncate(at / "model.onnx", 3), "model.onnx is truncated: it has 3", id="truncated"),
        pytest.param(lambda at: os.truncate(at / "model.onnx", 300), "model.onnx is changed: it has 300", id="grown"),
        pytest.param(lambda at: flip_a_bit(at / "weights" / "data.bin"), "weights/data.bin was changed", id="bit-flip"),
        pytest.param(lambda at: (at / "model.onnx").unlink(), "model.onnx is missing", id="missing-file"),
        pytest.param(lambda at: (at / "more.onnx").touch(), "more.onnx is there", id="foreign-file"),
        pytest.param(lambda at: (at / "entry.json").unlink(), "entry.json is missing", id="no-record"),
        pytest.param(lambda at: os.truncate(at / "entry.json", 40), "not valid JSON", id="half-a-record"),
        pytest.param(lambda at: (at / "entry.json").write_text("[]"), "the format is none", id="other-json"),
        pytest.param(
            lambda at: change_json(at / "entry.json", lambda values: values.update(format=99)),
            "the format is 99, this version reads 1", id="unknown-format",
        ),
        pytest.param(
            lambda at: change_json(at / "entry.json", lambda values: values.update(build_seconds=1.0)),
            "entry.json was changed after it was written", id="hand-edited",
        ),
        pytest.param(
            lambda at: change_json(at / "entry.json", lambda values: values.update(seconds=1.0)),
            "seconds is 1.0, but there is no such key", id="hand-edited-unknown-key",
        ),
        pytest.param(
            lambda at: change_json(at / "entry.json", edited_and_signed), "is that of another entry", id="foreign-entry"
        ),
        pytest.param(shutil.rmtree, None, id="all-gone"),
        pytest.param(replace_by_a_file, "entry.json is missing", id="a-file-in-its-place"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_built_again_with_one_warning(
    cache: EngineCache, damage: Callable[[Path], None], told: str | None
) -> None:
    folder = cache.get_or_build(KEY, builds(b"engine")).folder
    cache.get_or_build(KEY, never)
    damage(folder)
    assert len(cache.verify()) == (told is not None)
    assert all(line.startswith(KEY.digest) and told in line for line in cache.verify())
    assert cache.find(KEY) is None
    log: list[bytes] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry = cache.get_or_build(KEY, builds(b"again!", log))
        cache.get_or_build(KEY, never)
    assert log == [b"again!"]
    assert (entry.folder / "model.onnx").read_bytes() == b"again!"
    assert [warning.category for warning in caught] == [UserWarning] * (told is not None)
    if told:
        message = str(caught[0].message)
        assert told in message
        assert "unet for openvino" in message
        assert "\n" not in message
        assert caught[0].filename == __file__
    assert cache.verify() == []
    assert visible(cache) == [KEY.digest]
    assert hidden(cache) == []


def test_an_entry_copied_to_another_digest_is_not_used(cache: EngineCache) -> None:
    other = replace(KEY, precision="fp32")
    shutil.copytree(cache.get_or_build(KEY, builds()).folder, cache.folder / other.digest)
    with pytest.warns(UserWarning, match=f"is that of another entry, {KEY.digest}"):
        assert cache.get_or_build(other, builds(b"right")).key == other


def test_files_are_hashed_once_a_process_while_they_stay_the_same(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from catimage_accel.engines import cache_entry

    hashed: list[str] = []
    sha256 = cache_entry.file_sha256
    cache.get_or_build(KEY, builds())
    time.sleep(0.15)  # what has just changed is not remembered
    monkeypatch.setattr(cache_entry, "file_sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(3):
        EngineCache(cache.folder).get_or_build(KEY, never)
    assert sorted(hashed) == ["data.bin", "model.onnx"]
    os.utime(cache.folder / KEY.digest / "model.onnx")
    time.sleep(0.15)
    cache.get_or_build(KEY, never)
    assert hashed[2:] == ["model.onnx"]
    assert cache.verify() == []
    assert len(hashed) == 5


def test_what_a_build_raises_is_raised_and_leaves_nothing(cache: EngineCache) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyError("unsupported layer")

    with pytest.raises(KeyError, match="unsupported layer"):
        cache.get_or_build(KEY, build)
    assert visible(cache) == hidden(cache) == []
    assert cache.get_or_build(KEY, builds()).bytes == 24


@pytest.mark.parametrize(
    ("build", "told"),
    [
        pytest.param(lambda folder: None, "wrote no file", id="nothing"),
        pytest.param(lambda folder: (folder / "entry.json").touch(), "wrote entry.json", id="the-record's-name"),
        pytest.param(lambda folder: (folder / "a\\b").touch(), "leaves the entry's folder", id="other-system"),
    ],
)
def test_what_can_be_no_entry_is_refused(cache: EngineCache, build: Callable[[Path], None], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cache.get_or_build(KEY, build)
    assert visible(cache) == hidden(cache) == []
