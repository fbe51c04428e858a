"""What a corpus may be: its file kinds, its record shapes, and the sentence for each that is damaged."""

from __future__ import annotations

import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from firefly.errors import InputError
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.tokenizer import load

RECORDS = [{"text": "春眠，“不觉晓”", "n": 1}, {"text": 'a "quoted"\nline', "n": 2}, {"text": "𠮷", "n": 3}]
TEXTS = [str(record["text"]) for record in RECORDS]
LINES = "\n".join(json.dumps(record) for record in RECORDS)
CSV = 'n,text\n1,"春眠，“不觉晓”"\n2,"a ""quoted""\nline"\n3,𠮷\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=2, ensure_ascii=False)),
        ("a.json", "\ufeff " + json.dumps(RECORDS)),
        ("a.csv", CSV),
        (
            "a.csv",
            CSV.replace("n,text", "n,anything").replace("1,", ",").replace("2,", ",").replace("3,", ","),
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_the_same_texts_from_every_kind(tmp_path: Path, name: str, content: str, suffix: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    (tmp_path / f"{name}{suffix}").write_bytes(pack[suffix](content.encode("utf-8")))
    assert list(corpus_texts([tmp_path])) == list(corpus_texts([tmp_path / "a.*"])) == TEXTS


def test_parquet_reads_its_text_column_alone(tmp_path: Path) -> None:
    table = pa.table({"id": ["x", "y", "z"], "text": TEXTS, "blob": [b"\x00"] * 3})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(corpus_texts([tmp_path / "a.parquet"])) == TEXTS
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    parquet.write_table(pa.table({"id": [1, 2, 3], "messages": chats}), tmp_path / "a.parquet")
    assert list(corpus_texts([tmp_path])) == TEXTS


def test_zstandard_too(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.csv.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
        out.write(CSV.encode("utf-8"))
    assert list(corpus_texts([tmp_path])) == TEXTS


def test_json_values_larger_than_a_block_are_put_together(tmp_path: Path) -> None:
    texts = ["文" * 700_000, 'b"]' * 900_000, "c"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]), "utf-8")
    assert list(corpus_texts([tmp_path])) == texts


def test_a_long_array_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 30_000), "utf-8")
    tracemalloc.start()
    assert sum(1 for _ in corpus_texts([tmp_path])) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20 < (tmp_path / "a.json").stat().st_size


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "line 1: record 2 is not valid JSON"),
        ("a.json", b'[{"text": "a"}', "array breaks off after record 1"),
        ("a.json", b'{"text": "a"} nonsense', "line 1: record 2 is not valid JSON"),
        ("a.json", b'["\xff"]', "line 1: not valid UTF-8"),
        ("a.json", b"[1, 2]", "record 1: a JSON int where an object is needed"),
        ("a.json", b'[{"n": 1}]', "record 1: the record holds no text"),
        ("a.json.gz", gzip.compress(b'["a"]')[:-6], "damaged"),
        ("a.parquet", b"PAR1 nonsense", "not a sound Parquet file"),
        ("a.csv", b"text,n\n,\n", "line 2: the record holds no text"),
        ("a.csv", b"a,b\n1\n", "line 2: 1 cells where the header names 2"),
        ("a.parquet.gz", b"x", "cannot tell the format"),
        ("a.pdf", b"x", "cannot tell the format"),
    ],
)
def test_damaged_corpora_are_named(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        list(corpus_texts([tmp_path / name]))


def test_counting_keeps_one_batch_in_memory(content: dict[str, Any]) -> None:
    """Python's own memory, that is; the encodings of a batch live in Rust and die with it."""
    tokenizer: Tokenizer = load(content)

    def peak(num_texts: int) -> int:
        tracemalloc.start()
        counts = count_tokens(tokenizer, ("春眠不觉晓 the firefly " * 20 for _ in range(num_texts)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counts.sum() % num_texts == 0
        return found

    assert peak(12_000) < 1.2 * peak(5_000)
