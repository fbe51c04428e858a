"""Files are whole or absent: interrupted writes leave the old result, refusals are one sentence."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
from pathlib import Path

import pyarrow
import pytest

from firefly.errors import InputError, OutputError
from firefly.files import (
    directory_atomic,
    exclusive,
    exclusive_beside,
    read_json_lines,
    read_lines,
    require_disk,
    write_atomic,
)


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "result"
    with directory_atomic(place) as new:
        (new / "a").write_text("1")
    with pytest.raises(RuntimeError), directory_atomic(place) as new:
        (new / "a").write_text("2")
        raise RuntimeError
    assert (place / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_kill_between_the_renames_is_mended(tmp_path: Path) -> None:
    """The old directory stands aside for a moment; a run killed right then finds it again."""
    place = tmp_path / "result"
    (tmp_path / ".result.retired").mkdir()
    (tmp_path / ".result.retired" / "a").write_text("1")
    (tmp_path / ".result.partial").mkdir()
    with pytest.raises(RuntimeError), directory_atomic(place):
        raise RuntimeError
    assert (place / "a").read_text() == "1"


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "Cannot write")])
def test_refusals_are_sentences(tmp_path: Path, number: int, says: str) -> None:
    with pytest.raises(OutputError, match=says), directory_atomic(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert not any(tmp_path.iterdir())


def test_writing_below_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Choose an output_dir"):
        write_atomic(tmp_path / "file" / "x", "text")


def test_disk_check(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match="MiB free"):
        require_disk(tmp_path, 1 << 62)


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path, "training"),
        pytest.raises(OutputError, match="Another process"),
        exclusive(tmp_path, "x"),
    ):
        pass
    with exclusive(tmp_path, "training"):
        pass


def test_a_name_is_held_before_it_exists_and_no_lock_stays(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for _ in range(2):
        with exclusive_beside(out, "pruning"):
            with (
                pytest.raises(OutputError, match=r"Another process is working in .*out \(pruning\)"),
                exclusive_beside(out, "pruning"),
            ):
                pass
            with directory_atomic(out) as place, exclusive_beside(out.with_name("other"), "x"):
                (place / "a").touch()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out.parent / ".out.lock").touch()  # of a process that was killed
    with exclusive_beside(out, "pruning"):
        pass


def test_lines_of_any_packing(tmp_path: Path) -> None:
    text = "﻿一\r\n二\n三".encode()
    zstd = pyarrow.compress(text, "zstd", asbytes=True)
    for name, content in {
        "a.txt": text,
        "a.gz": gzip.compress(text),
        "a.xz": lzma.compress(text),
        "a.zst": zstd,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert list(read_lines(tmp_path / name)) == [(1, "一"), (2, "二"), (3, "三")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n{"a": \n', r"line 2: not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', r"line 3: a JSON list where an object is needed"),
        (b'{"a": 1}\n\xff\n', r"line 2: byte 0 is not valid UTF-8"),
        (b"", "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(read_json_lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    pack = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    }
    path.write_bytes(pack[suffix](os.urandom(3000))[:-200])
    with pytest.raises(InputError):
        list(read_json_lines(path))
    with pytest.raises(InputError, match="does not exist"):
        list(read_lines(tmp_path / "nothing"))
    with pytest.raises(InputError, match="is a directory"):
        list(read_lines(tmp_path))
