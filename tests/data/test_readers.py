"""Readers: every format gives the same records, and every bad place is one sentence with file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from firefly import files
from firefly.data.readers import files_of, read_records, read_tolerant
from firefly.errors import InputError

RECORDS = [{"上联": "风急天高", "下联": "浪静\t海阔"}, {"上联": 'a "b", c', "下联": "二\r\n行"}]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def written(records: list[dict[str, Any]], kind: str) -> bytes:
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if kind == ".json":
        return json.dumps(records).encode()
    if kind == ".parquet":
        stream = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(records), stream)
        return stream.getvalue()
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, records[0], lineterminator="\n")
    rows.writeheader()
    rows.writerows(records)
    return text.getvalue().encode()


def of(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_records(path)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv"])
def test_a_record_is_the_same_in_every_format_and_packing(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"x{kind}{packing}"
    path.write_bytes(PACK[packing](written(RECORDS, kind)))
    # Inside a quoted cell, CSV's line end is the file's own.
    expected = [RECORDS[0], RECORDS[1] | ({"下联": "二\n行"} if kind == ".csv" else {})]
    assert of(path) == expected
    path.with_name("y.parquet").write_bytes(written(RECORDS, ".parquet"))
    assert of(path.with_name("y.parquet")) == RECORDS


def test_plain_text_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeff一\r\n\r\n 二\n".encode())
    assert list(read_records(tmp_path / "x.txt")) == [(1, {"text": "一"}), (3, {"text": " 二"})]
    (tmp_path / "x.tsv").write_text('first\tsecond\n"引"号\t不成对"\n', "utf-8")
    assert of(tmp_path / "x.tsv") == [{"first": '"引"号', "second": '不成对"'}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=4), max_size=6),
    st.sampled_from([None, 2]),
    st.sampled_from(["array", "lines", "values"]),
    st.integers(1, 40),
)
def test_json_reads_as_python_reads_it(
    records: list[Any], indent: int | None, shape: str, block_bytes: int
) -> None:
    """Arrays, lines and values one after the other, whatever the borders of the blocks that are read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        if shape == "array":
            path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), "utf-8")
        else:
            step = indent if shape == "values" else None
            path.write_text("\n".join(json.dumps(record, indent=step) for record in records), "utf-8")
        if not path.stat().st_size:
            return
        small = {path: lambda: _Trickle(path.read_bytes(), block_bytes)}
        with patch("firefly.data.readers.open_binary", lambda name: small[name]()):
            assert of(path) == records


class _Trickle(io.BytesIO):
    """A stream that gives a few bytes at a time, whatever it is asked for."""

    def __init__(self, data: bytes, block_bytes: int) -> None:
        super().__init__(data)
        self.block_bytes = block_bytes

    def read(self, size: int | None = -1) -> bytes:  # noqa: ARG002
        return super().read(self.block_bytes)


GOOD = b'{"a": "1"}\n'
BAD_LINES = {
    "cut off": (b'{"a": \n', "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}\n', "byte 7 is not valid UTF-8"),
    "a list": (b"[1]\n", "a JSON list where an object is needed"),
    "deep": (b'{"a":' * 100_000 + b"\n", "nested too deeply"),
    "deep list": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "101 levels": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}\n", "nested too deeply, more than 100 levels"),
    "NaN": (b'{"a": NaN}\n', "NaN is not a JSON number"),
    "infinite": (b'{"a": -Infinity}\n', "-Infinity is not a JSON number"),
    "too large": (b'{"a": 1e999}\n', "1e999 is not a JSON number"),
    "long number": (b'{"a": ' + b"9" * 9999 + b"}\n", "not valid JSON"),
    "key twice": (b'{"a": 1, "b": {"k": 1, "\xe9\x94\xae": 2, "\xe9\x94\xae": 3}}\n', 'the key "键" occurs twice'),
    "half a pair": (b'{"a": "\\ud83d"}\n', r"half of a surrogate pair, \\ud83d"),
    "half a pair in a key": (b'{"\\uDE00": 1}\n', r"half of a surrogate pair, \\ude00"),
    "two on a line": (b'{"a": 1} {"a": 2}\n', "not valid JSON"),
    "control character": (b'{"a": "\x00"}\n', "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_the_next_ones_are_read(tmp_path: Path, case: str) -> None:
    line, says = BAD_LINES[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=rf"x\.jsonl, line 2: .*{says}"):
        of(path)
    found = list(read_tolerant(path))
    assert [number for number, _ in found] == [1, 2, 4]
    assert [isinstance(record, InputError) for _, record in found] == [False, True, False]
    assert "\n" not in str(found[1][1])


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_json_lines_may_be_called_json(tmp_path: Path, bad: int) -> None:
    lines = [GOOD] * 3
    lines[bad] = b'{"a": \n'
    (tmp_path / "x.json").write_bytes(b"".join(lines))
    found = [isinstance(record, InputError) for _, record in read_tolerant(tmp_path / "x.json")]
    assert found == [index == bad for index in range(3)]


def test_a_hundred_levels_and_many_brackets_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}\n" + b'{"a": [' + b"[[]], " * 200 + b"[]]}\n")
    assert len(of(path)) == 2


def test_emoji_bom_and_crlf_are_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\r\n\r\n{"id": 7, "x": 0.5}')
    assert list(read_records(path)) == [(1, {"a": "😀"}), (3, {"id": 7, "x": 0.5})]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"a,b\n1\n", "line 2: 1 cells where the header names 2 \\(a, b\\)"),
        ("x.csv", b"a,b\n1,2,3\n", "line 2: 3 cells"),
        ("x.csv", b"a,a\n1,2\n", "line 1: the header names 'a' twice"),
        ("x.csv", b'a,b\n1,2\n3,"4\n\n5,6\n', "line 3: not valid CSV"),
        ("x.csv", b'a,b\n"1"2,3\n', "line 2: not valid CSV"),
        ("x.csv", b"a,b\n1,\xff\n", "line 2: byte 2 is not valid UTF-8"),
        ("x.txt", b"\x00\xb0\n", "line 1: byte 1 is not valid UTF-8"),
        ("x.json", b'[{"a": 1},\n{"a": 2},\n{"a": }]', "line 3: record 3 is not valid JSON"),
        ("x.json", b'[{"a": 1}', "breaks off after record 1"),
        ("x.json", b'[{"a": 1}, ', "record 2 is not valid JSON"),
        ("x.json", b'[{"a": 1} {"a": 2}]', "is out of place"),
        ("x.json", b'[{"a": 1}] []', "is out of place"),
        ("x.json", b'[{"a": 1},]', "record 2 is not valid JSON"),
        ("x.json", b'[{"a": 1},\n{"a": "\xff"}]', "not valid UTF-8"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'{"a": 1', "line 1: record 1 is not valid JSON"),
        ("x.jsonl", b"", "is empty"),
        ("x.json", b"", "is empty"),
        ("x.parquet", b"PAR1 no", "not a sound Parquet file"),
        ("x.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "breaks off or is damaged"),
        ("x.json.xz", lzma.compress(GOOD * 99)[:-20], "damaged"),
        ("x.jsonl.zst", PACK[".zst"](GOOD * 99)[:-6], "cannot be read after line"),
        ("x.jsonl.gz", GOOD, "damaged"),
        ("x.docx", GOOD, "cannot tell the format from the name"),
        ("x.parquet.gz", GOOD, "cannot tell the format from the name"),
    ],
)
def test_hostile_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        of(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_byte_inside_gzip_is_one_sentence(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(bytes(range(256)) * 40))
    for at in range(20, 60):
        data[at] ^= 0xFF
    (tmp_path / "x.txt.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.txt\.gz.*(damaged|UTF-8)"):
        of(tmp_path / "x.txt.gz")


def test_refused_elements_of_an_array_do_not_spoil_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": NaN}, 7, {"a": 1, "a": 2}, {"a": "\\ud83d"}, {"a": 3}]')
    found = [record for _, record in read_tolerant(path)]
    assert found[0] == {"a": 1} and found[-1] == {"a": 3}
    says = ["record 2: .*NaN", "record 3: a JSON int", "record 4: .*occurs twice", "record 5: .*surrogate"]
    for record, expected in zip(found[1:5], says, strict=True):
        with pytest.raises(InputError, match=expected):
            raise record  # type: ignore[misc]


def test_bad_rows_of_csv_do_not_spoil_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'a,b\n1,2\n3\n"4\n\xff",5\n6,"7\n8"\n"9"9,1\n10,11\n')
    found = list(read_tolerant(path))
    assert [(number, record) for number, record in found if isinstance(record, dict)] == [
        (2, {"a": "1", "b": "2"}),
        (6, {"a": "6", "b": "7\n8"}),
        (9, {"a": "10", "b": "11"}),
    ]
    assert [number for number, record in found if isinstance(record, InputError)] == [3, 4, 8]


def test_a_parquet_row_that_is_not_utf8_does_not_spoil_the_others(tmp_path: Path) -> None:
    raw = pyarrow.array([b"\xe4\xb8\x80", b"\xff", b"\xe4\xba\x8c"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found = list(read_tolerant(tmp_path / "x.parquet"))
    assert found[0] == (1, {"text": "一"}) and found[2] == (3, {"text": "二"})
    assert isinstance(found[1][1], InputError) and "row 2: not valid UTF-8" in str(found[1][1])


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.txt.gz", "x.json", "x.csv"])
def test_an_endless_line_is_named_and_never_held(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2 << 20
    monkeypatch.setattr(files, "LONGEST_LINE_BYTES", limit)
    monkeypatch.setattr("firefly.data.readers.LONGEST_LINE_BYTES", limit)
    first, last = {"j": (b'{"a": "1"}\n', b"\n" + GOOD), "c": (b"a\n1\n", b"\n2\n")}.get(
        name[2], (b"1\n", b"\n2\n")
    )
    content = first + b'{"a": "' + b"x" * 40 * limit + last
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    del content
    tracemalloc.start()
    found = list(read_tolerant(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(record, InputError) for _, record in found] == [False, True, False]
    assert "longer than 2 MiB" in str(found[1][1])
    assert peak < 6 * limit


def test_an_endless_value_of_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.data.readers.LONGEST_LINE_BYTES", 1 << 20)
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}, {"a": "' + b"x" * (20 << 20))
    with pytest.raises(InputError, match="longer than 1 MiB"):
        of(tmp_path / "x.json")


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open_binary", refuse)
    with pytest.raises(InputError, match=r"x\.jsonl: cannot be read .*Permission denied.*check its rights"):
        of(tmp_path / "x.jsonl")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match=r"d\.jsonl is a directory"):
        of(tmp_path / "d.jsonl")


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt.gz", "a.csv", "c.pdf", ".hidden.txt", "b/.git/x.txt", "[1].json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)

    def names(pattern: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path / pattern)]

    assert names(".") == ["[1].json", "a.csv", "b/1.txt.gz", "b/2.jsonl"]
    assert names("a.csv") == ["a.csv"]
    assert names("[1].json") == ["[1].json"]
    assert names("*.csv") == ["a.csv"]
    assert names("**/*.jsonl") == ["b/2.jsonl"]
    assert names("b*") == ["b/1.txt.gz", "b/2.jsonl"]
    with pytest.raises(InputError, match="No file matches the pattern"):
        names("*.parquet")
    with pytest.raises(InputError, match="does not exist"):
        names("no.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file of a known kind"):
        names("empty")
