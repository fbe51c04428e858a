"""Files that are either whole or absent: atomic writes, hashes, disk checks, compressed readers.

A result is written under a temporary name beside its destination, fsynced, and renamed. A process killed at
any moment leaves the old result or the new one, never half of either; leftovers are named `.NAME.partial`
and are swept by the next write.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from firefly.errors import DiskFullError, InputError, OutputError

_REFUSED = re.compile(r"os error (\d+)")  # how safetensors' own writer tells of the system's refusal
_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `path` into one sentence (`OutputError`)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = _REFUSED.search(str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number in _FULL:
            raise DiskFullError(
                f"The disk is full while writing {path}; earlier results are untouched. "
                "Free some space, or choose another output_dir, and run the same command again."
            ) from error
        if number in _UNWRITABLE:
            reason = os.strerror(number)
            raise OutputError(
                f"Cannot write {path}: {reason}. Choose an output_dir that you may write to."
            ) from error
        raise


def partial_name(path: Path) -> Path:
    """The temporary name under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


def fsync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_name(path)
        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def directory_atomic(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name; it takes its real name only when the block ends well.

    An earlier directory of that name stays until the new one is complete and on the disk.
    """
    with writing_to(path):
        temporary, retired = partial_name(path), path.with_name(f".{path.name}.retired")
        if retired.exists() and not path.exists():  # killed between the two renames below
            retired.rename(path)
        for leftover in (temporary, retired):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for item in sorted(temporary.rglob("*")):
                fsync(item)
            fsync(temporary)
            if path.exists():
                path.rename(retired)
            temporary.rename(path)
            fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if retired.exists() and not path.exists():
                retired.rename(path)
            raise
        shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def exclusive(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory` for this process alone; raises `OutputError` when another one works there.

    The lock goes with the process, so a killed one leaves nothing to clean up.
    """
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("w")
    with handle:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"Another process is working in {directory} ({what}); wait for it, or choose another output_dir."
                ) from error
        yield


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hexadecimal."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def require_disk(path: Path, needed_bytes: int) -> None:
    """Raise `OutputError` unless the disk that holds `path` has `needed_bytes` free."""
    place = path
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise DiskFullError(
            f"{path} needs {needed_bytes / 2**20:,.0f} MiB and the disk has {free_bytes / 2**20:,.0f} MiB free. "
            "Free some space, or choose another output_dir."
        )


def locate(name: str) -> Path:
    """The path that a recipe means: `demo:NAME` lies inside the package, anything else is itself."""
    if name.startswith("demo:"):
        return Path(__file__).parent / "demo" / name.removeprefix("demo:")
    return Path(name).expanduser()


def require_file(path: Path, what: str) -> Path:
    """Return `path` if it is a non-empty file, else raise `InputError` naming `what` it should be."""
    if path.is_dir():
        raise InputError(f"{what} {path} is a directory; name a file in it.")
    if not path.is_file():
        raise InputError(
            f"{what} {path} does not exist; check the path (relative paths start at {Path.cwd()})."
        )
    if path.stat().st_size == 0:
        raise InputError(f"{what} {path} is empty; give a file with content.")
    return path


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressing .gz, .xz and .zst by their suffix."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")  # type: ignore[no-any-return]
    return path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end); BOM and CRLF are taken off.

    Raises `InputError` for a missing or empty file, broken compression, or a line that is not UTF-8.
    """
    require_file(path, "The file")
    number = 0
    try:
        with open_binary(path) as stream:
            for number, raw in enumerate(_split_lines(stream), start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, raw.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: byte {error.start} is not valid UTF-8; "
                        "convert the file to UTF-8 (for example with `iconv -f GB18030 -t UTF-8`)."
                    ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: the compressed data breaks off or is damaged after line {number}; fetch or compress it again."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read after line {number} ({error}); check its rights, or fetch or compress it again."
        ) from error


def _split_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of a binary stream; works for streams that cannot iterate (pyarrow's)."""
    rest = b""
    while block := stream.read(1 << 20):
        lines = (rest + bytes(block)).split(b"\n")
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a JSON Lines file; blank lines are passed over.

    Raises `InputError` naming file and line for anything that is not one JSON object a line.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error}); write one JSON object a line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: a JSON {type(record).__name__} where an object is needed; "
                'write one object a line, like {"kind": …, "input": …, "target": …}.'
            )
        yield number, record
