"""Tokens directories: nothing is lost silently, damage is found, packing and order are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.chatformat import render
from firefly.data.dataset import build_dataset, read_dataset
from firefly.data.loader import TrainingStream, in_order, pack
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens, TokensResult, encode_dataset
from firefly.errors import InputError
from firefly.recipe import DataSection
from tiny import write_pairs

Encode = Callable[..., tuple[Path, TokensResult]]


@pytest.fixture
def encode(tiny: Callable[[str], Path], tmp_path: Path) -> Encode:
    def made(source: Path, importer: str = "firefly", **options: Any) -> tuple[Path, TokensResult]:
        settings = {
            "sources": [{"path": str(source), "importer": importer}],
            "validation_fraction": 0.2,
            "clean": {"max_repetition": 1.0},  # samples here are one character over and over
            **options,
        }
        data = DataSection.model_validate(settings)
        build_dataset(data, tmp_path / "dataset")
        return tmp_path / "tokens", encode_dataset(
            tmp_path / "dataset", tiny("bloom"), data, tmp_path / "tokens"
        )

    return made


def test_every_example_comes_back(encode: Encode, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    place, result = encode(write_pairs(tmp_path / "p.jsonl"))
    tokenizer = ModelTokenizer.load(tiny("bloom"))
    assert result.samples["train"] + result.samples["validation"] == 120 and not result.cuts
    for split in ("train", "validation"):
        tokens = Tokens.open(place, split, tokenizer.sha256)
        examples = list(read_dataset(tmp_path / "dataset", split))
        assert len(tokens) == len(examples) == result.samples[split]
        for number, example in enumerate(examples):
            sample, rendered = tokens.sample(number), render(example.messages, tokenizer)
            assert (sample.ids.tolist(), sample.mask.astype(bool).tolist()) == (rendered.ids, rendered.mask)
            assert (sample.kind, sample.origin) == (example.kind, number)
            assert tokens.target_bytes[number] == len(example.target.encode())


def long_pairs(path: Path, question: int, answer: int) -> Path:
    rows = [
        {"kind": "K", "input": "问" * question + str(i), "target": "答" * answer + str(i)} for i in range(10)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_truncation_is_counted_and_keeps_the_prompt(encode: Encode, tmp_path: Path) -> None:
    place, result = encode(long_pairs(tmp_path / "p.jsonl", 2, 40), max_seq_length=32)
    assert result.cuts == {"K": {"truncated": 10}} and result.longest_tokens == 32
    tokens = Tokens.open(place, "train")
    sample = tokens.sample(0)
    assert (
        len(sample.ids) == 32 and sample.mask.any() and sample.ids[-1] != 2
    )  # cut, and not as if it ended there


def test_dropping_is_counted(encode: Encode, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "p.jsonl", 20).read_text("utf-8")
    long = long_pairs(tmp_path / "q.jsonl", 2, 90).read_text("utf-8")
    (tmp_path / "r.jsonl").write_text(rows + long, encoding="utf-8")
    _, result = encode(tmp_path / "r.jsonl", max_seq_length=128, overlong="drop")
    assert result.cuts == {"K": {"overlong_dropped": 10}}
    assert sum(result.samples.values()) == 20


def test_a_target_cut_entirely_is_an_error_unless_allowed(encode: Encode, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "p.jsonl", 20).read_text("utf-8")
    long = long_pairs(tmp_path / "q.jsonl", 90, 2).read_text("utf-8")
    (tmp_path / "r.jsonl").write_text(rows + long, encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.jsonl:\d+ \(K\): the input alone fills max_seq_length = 128"):
        encode(tmp_path / "r.jsonl", max_seq_length=128)
    assert not (tmp_path / "tokens").exists()
    _, result = encode(tmp_path / "r.jsonl", max_seq_length=128, allow_lost_targets=True)
    assert result.cuts == {"K": {"target_lost": 10}}
    with pytest.raises(InputError, match=r"raise data\.max_seq_length"):
        encode(tmp_path / "r.jsonl", max_seq_length=128, overlong="error")


def test_a_long_plain_text_loses_nothing(encode: Encode, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    text = "".join(f"第{number}句话。" for number in range(60))
    (tmp_path / "t.txt").write_text(text + "\n" + text[::-1], encoding="utf-8")
    place, _ = encode(tmp_path / "t.txt", importer="text", max_seq_length=50, validation_fraction=0)
    tokenizer, tokens = ModelTokenizer.load(tiny("bloom")), Tokens.open(place, "train")
    learned = np.concatenate(
        [tokens.sample(n).ids[tokens.sample(n).mask.astype(bool)] for n in range(len(tokens))]
    )
    expected = [*tokenizer.encode(text), 2, *tokenizer.encode(text[::-1]), 2]
    assert learned.tolist() == expected  # each token learned exactly once, in order
    assert len(tokens) > 10


def test_damage_is_found(encode: Encode, tmp_path: Path) -> None:
    place, _ = encode(write_pairs(tmp_path / "p.jsonl"))
    path = place / "train" / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokens\.bin is missing or damaged"):
        Tokens.open(place, "train")
    with pytest.raises(InputError, match="not a tokens directory"):
        Tokens.open(tmp_path, "train")


def test_the_stream_is_a_function_of_seed_and_position(encode: Encode, tmp_path: Path) -> None:
    tokens = Tokens.open(encode(write_pairs(tmp_path / "p.jsonl"))[0], "train")
    stream = TrainingStream(tokens, 7, seed=3)
    seen = [number for batch in range(len(tokens)) for number in stream.batch(batch).sample_ids]
    for epoch in range(7):
        part = seen[epoch * len(tokens) : (epoch + 1) * len(tokens)]
        assert sorted(part) == list(range(len(tokens)))  # every sample once an epoch
        assert part != sorted(part)
    again = TrainingStream(tokens, 7, seed=3).batch(11)
    assert again.sample_ids == seen[77:84]
    assert TrainingStream(tokens, 7, seed=4).batch(0).sample_ids != seen[:7]


def test_in_order_passes_every_sample_once(encode: Encode, tmp_path: Path) -> None:
    tokens = Tokens.open(encode(write_pairs(tmp_path / "p.jsonl"))[0], "train")
    batches = list(in_order(tokens, max_tokens=100))
    assert [number for batch in batches for number in batch.sample_ids] == list(range(len(tokens)))
    assert len(batches) > 3


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=6
    )
)
def test_packing(samples: list[list[tuple[int, bool]]]) -> None:
    """Targets are the masked tokens that have a predecessor in their own sample, and nothing else."""
    batch = pack([(np.array([i for i, _ in one]), np.array([m for _, m in one])) for one in samples])
    assert batch.input_ids.tolist() == [token for one in samples for token, _ in one]
    assert batch.position_ids.tolist() == [place for one in samples for place in range(len(one))]
    expected = [
        (start + place - 1, one[place][0], number)
        for number, (one, start) in enumerate(zip(samples, batch.borders, strict=False))
        for place in range(1, len(one))
        if one[place][1]
    ]
    found = zip(
        batch.target_positions.tolist(), batch.target_ids.tolist(), batch.target_samples.tolist(), strict=True
    )
    assert list(found) == expected
