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
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
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
_DEEPEST_JSON = 100  # levels
LONGEST_LINE_BYTES = 64 << 20  # a longer line is a mistake, and is not held in memory


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
    with _locked(directory / ".lock", directory, what):
        yield


def is_held(directory: Path) -> bool:
    """Whether a process holds `directory` through `exclusive` now; asking leaves nothing behind."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        with (directory / ".lock").open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or not ours to look at
        return False
    return False


@contextlib.contextmanager
def exclusive_beside(path: Path, what: str) -> Iterator[None]:
    """Hold the name `path` for this process alone, whether or not it exists yet, by a lock file beside it.

    For results that replace `path` as a whole, and so could not hold a lock in it. Raises as `exclusive` does.
    """
    if path.exists() and (not path.name or path.samefile(".")):
        raise OutputError(
            f"The output {path} is the directory you are in, or the root, and cannot be replaced as a whole; name a "
            f"directory inside, such as {path / 'result'}."
        )
    lock = path.with_name(f".{path.name}.lock")
    with _locked(lock, path, what):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # while it is held: who opened it in time finds it gone, below
                lock.unlink()


@contextlib.contextmanager
def _locked(lock: Path, place: Path, what: str) -> Iterator[None]:
    """Hold the lock file `lock`, which stands for `place`."""
    with writing_to(place):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    with handle:
        if os.name == "posix":
            try:
                _flock(handle)
                if not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                    raise BlockingIOError  # its holder has ended and taken it away in this very moment
            except (BlockingIOError, FileNotFoundError) as error:
                raise OutputError(
                    f"Another process is working in {place} ({what}); wait for it, or choose another output_dir."
                ) from error
        yield


def _flock(handle: IO[str]) -> None:
    """Lock the file, or raise `BlockingIOError`.

    A process that was killed while it started a child holds its locks until the child comes to itself: wait for that.
    """
    import fcntl

    for patience in range(20, -1, -1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not patience:
                raise
            time.sleep(0.02)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hexadecimal."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_disk(path: Path, needed_bytes: int) -> None:
    """Raise `OutputError` unless the disk that holds `path` has `needed_bytes` free."""
    free_bytes = free_disk_bytes(path)
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

    Raises `InputError` for a missing or empty file, broken compression, or a line that is not UTF-8 or too long.
    """
    for number, line in read_lines_tolerant(path):
        if isinstance(line, BadLine):
            raise line
        yield number, line


class BadLine(InputError):
    """A line that is too long or not UTF-8; `text` is what could be read of it, with � where bytes are wrong."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


def read_lines_tolerant(path: Path) -> Iterator[tuple[int, str | BadLine]]:
    """Like `read_lines`, but a bad line comes as the error about it, and the next lines follow.

    Still raises when nothing further can be read: a missing, empty or unreadable file, broken compression.
    """
    require_file(path, "The file")
    number = 0
    with damage_named(path, lambda: f"after line {number}"), open_binary(path) as stream:
        for number, raw in enumerate(_split_lines(stream), start=1):
            line: str | BadLine
            if raw is None:
                limit = f"longer than {LONGEST_LINE_BYTES >> 20} MiB"
                line = BadLine(f"{path}, line {number}: {limit}; split the file into lines, one record each.")
            else:
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                raw = raw.rstrip(b"\r\n")
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    line = BadLine(
                        f"{path}, line {number}: byte {error.start} is not valid UTF-8; "
                        "convert the file to UTF-8 (for example with `iconv -f GB18030 -t UTF-8`).",
                        raw.decode("utf-8", "replace"),
                    )
            yield number, line


@contextlib.contextmanager
def damage_named(path: Path, where: Callable[[], str]) -> Iterator[None]:
    """Turn broken compression and the system's refusals while reading `path` into one sentence (`InputError`)."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise InputError(
            f"{path}: the compressed data breaks off or is damaged {where()}; fetch or compress it again."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read {where()} ({error}); check its rights, or fetch or compress it again."
        ) from error


def _split_lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a binary stream, None for one that is too long; works where iteration does not (pyarrow)."""
    held: list[bytes] = []  # the beginning of the line that the last block did not end
    held_bytes = 0
    while block := stream.read(1 << 20):
        lines = bytes(block).split(b"\n")
        if len(lines) > 1:
            yield None if held_bytes > LONGEST_LINE_BYTES else b"".join([*held, lines[0]])
            yield from lines[1:-1]
            held, held_bytes = [], 0
        held_bytes += len(lines[-1])
        if held_bytes > LONGEST_LINE_BYTES:  # the rest of the line is passed over
            held = []
        else:
            held.append(lines[-1])
    if held_bytes:
        yield None if held_bytes > LONGEST_LINE_BYTES else b"".join(held)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a JSON Lines file; blank lines are passed over.

    Raises `InputError` naming file and line for anything that is not one JSON object a line.
    """
    for number, line in read_lines(path):
        if line and not line.isspace():
            yield number, json_object(line, f"{path}, line {number}")


def json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object that `text` holds; raises `InputError` beginning with `where`.

    Stricter than Python's parser, as other readers of the same file will be: no NaN, no infinite number, no key
    twice in an object, no half of a surrogate pair.
    """
    try:
        record = JSON_DECODER.decode(text)
        check_json(record, text, 0, len(text))
    except (ValueError, RecursionError) as error:
        raise not_json(error, where) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a JSON {type(record).__name__} where an object is needed; "
            'write one object a line, like {"kind": …, "input": …, "target": …}.'
        )
    return record


class RefusedJSON(ValueError):
    """JSON that is well-formed for Python's parser, and refused here."""


def not_json(error: ValueError | RecursionError, where: str) -> InputError:
    """The sentence about a text that `JSON_DECODER` refused."""
    why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):  # its own words have a line, too, which is always 1
        why = f"{error.msg} at column {error.colno}"
    return InputError(f"{where}: not valid JSON ({why}); write one JSON object a line.")


def check_json(record: Any, text: str, start: int, end: int) -> None:
    """Raise `RefusedJSON` for what the parser lets pass in the record that stands at text[start:end].

    Half of a surrogate pair (an emoji cut apart by some program), which UTF-8 cannot hold; and nesting so deep that
    a later function could exceed Python's stack.
    """
    if text.find("\\u", start, end) >= 0:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise RefusedJSON(f"half of a surrogate pair, \\u{half:04x}, is no character") from error
    if text.count("[", start, end) + text.count("{", start, end) > _DEEPEST_JSON:
        level = [record]
        for _ in range(_DEEPEST_JSON):
            inner = (item.values() if isinstance(item, dict) else item for item in level)
            level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if level:
            raise RefusedJSON(f"nested too deeply, more than {_DEEPEST_JSON} levels")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise RefusedJSON(f"the key {json.dumps(twice, ensure_ascii=False)} occurs twice in one object")
    return record


def _no_constant(name: str) -> float:
    raise RefusedJSON(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text)


JSON_DECODER = json.JSONDecoder(
    object_pairs_hook=_each_key_once, parse_constant=_no_constant, parse_float=_finite
)
