"""Tokens directories: nothing is lost silently, damage is found, packing and order are exact."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data import encoder as encoder_module
from firefly.data import tokens as tokens_module
from firefly.data.chatformat import open_format, render
from firefly.data.dataset import build_dataset, read_dataset
from firefly.data.encoder import ENCODERS, KitokenEncoder
from firefly.data.example import Example, Message
from firefly.data.loader import TrainingStream, in_order, pack
from firefly.data.sequences import EncodedTexts
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens, TokensResult, encode_dataset
from firefly.errors import InputError
from firefly.files import sha256_file
from firefly.recipe import DataSection
from tiny import phrases, write_pairs

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


def test_a_cut_target_is_counted_and_does_not_end(encode: Encode, tmp_path: Path) -> None:
    source = long_pairs(tmp_path / "p.jsonl", 2, 40)
    place, result = encode(source, max_seq_length=32, overlong="right-of-target")
    assert result.cuts == {"K": {"target_end_cut": 10}} and result.longest_tokens == 32
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
    options = {"max_seq_length": 128, "overlong": "right-of-target"}
    with pytest.raises(InputError, match=r"r\.jsonl:\d+ \(K\): the input alone fills max_seq_length = 128"):
        encode(tmp_path / "r.jsonl", **options)
    assert not (tmp_path / "tokens").exists()
    _, result = encode(tmp_path / "r.jsonl", allow_lost_targets=True, **options)
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
    for junk in ("", "[]", '{"tokens": 3}', "\x00"):
        (place / "index.json").write_text(junk)
        with pytest.raises(InputError, match=r"index\.json is damaged; delete .* and run"):
            Tokens.open(place, "train")


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


def many_lines(path: Path, count: int) -> Path:
    """Lines of a dataset: short and overlong ones, several turns, plain texts, two kinds."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            turns = [Message("system", "简短")] * (number % 3 == 0)
            for _ in range(rng.choice([1, 1, 2, 4])):
                turns += [Message("user", phrases(rng, 30)), Message("assistant", phrases(rng, 4))]
            example = Example(f"K{number % 2}", tuple(turns), f"{number}")
            if number % 10 == 7:
                example = Example.plain("Plain", phrases(rng, 30))
            handle.write(example.to_json() + "\n")
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset directory of several blocks."""
    (tmp_path / "dataset").mkdir()
    many_lines(tmp_path / "dataset" / "train.jsonl", 2500)
    many_lines(tmp_path / "dataset" / "validation.jsonl", 30)
    return tmp_path / "dataset"


def section(**options: Any) -> DataSection:
    table = {"sources": [{"path": "none"}], "max_seq_length": 96, "allow_lost_targets": True}
    return DataSection.model_validate(table | options)


def digests(place: Path) -> dict[str, str]:
    return {
        path.relative_to(place).as_posix(): sha256_file(path)
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.suffix != ".png"
    }


def test_the_same_bytes_for_any_number_of_workers(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_SMALL_BYTES", 0)
    made = []
    for workers in (1, 2):
        encode_dataset(dataset, tiny("bloom"), section(num_workers=workers), tmp_path / str(workers))
        made.append(digests(tmp_path / str(workers)))
    assert made[0] == made[1]


def test_every_sample_is_what_its_line_renders_to(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whole where it fits; each of its answers' tokens otherwise, and cuts add up."""
    result = encode_dataset(dataset, tiny("bloom"), section(), tmp_path / "tokens")
    tokens, tokenizer = Tokens.open(tmp_path / "tokens", "train"), ModelTokenizer.load(tiny("bloom"))
    examples, chat_format = list(read_dataset(dataset, "train")), open_format("firefly", tokenizer)
    whole = 0
    for number in range(len(tokens)):
        sample = tokens.sample(number)
        example = examples[sample.origin]
        rendered = chat_format.render(example.messages)
        assert sample.kind == example.kind and len(sample.ids) <= 96
        if len(rendered.ids) <= 96:
            assert sample.ids.tolist() == rendered.ids and sample.mask.astype(bool).tolist() == rendered.mask
            whole += 1
        elif not example.is_plain:
            ending = [*tokenizer.encode(example.target), tokenizer.eos_id]
            assert sample.ids[-len(ending) :].tolist() == ending and sample.mask[-len(ending) :].all()
    fitting = sum(len(chat_format.render(example.messages).ids) <= 96 for example in examples)
    assert whole == fitting
    reasons = {reason for counts in result.cuts.values() for reason in counts}
    assert reasons >= {"turns_dropped", "input_middle_cut"}
    assert np.all(np.diff(tokens.origins) >= 0)


def test_a_difference_of_the_faster_encoder_is_found_and_undone(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are done again from the last audited one on: not a byte of its work stays."""
    monkeypatch.setattr(
        tokens_module, "_BLOCK_BYTES", (dataset / "train.jsonl").stat().st_size * 2 // 5
    )  # three blocks
    encode_dataset(dataset, tiny("bloom"), section(), tmp_path / "right")
    honest, calls = KitokenEncoder.encode_many, []

    def wrong_in_the_second_block(self: KitokenEncoder, texts: list[str]) -> EncodedTexts:
        calls.append(len(texts))
        ids = honest(self, texts).lists()
        if len(calls) > 1:
            ids[3].insert(0, 5)
        return EncodedTexts.of(ids)

    monkeypatch.setattr(tokens_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(tokens_module, "_ENCODERS", ("kitoken",))
    monkeypatch.setattr(encoder_module, "proved", lambda name, tokenizer, _: ENCODERS[name](tokenizer))
    monkeypatch.setattr(KitokenEncoder, "encode_many", wrong_in_the_second_block)
    warned: list[str] = []
    monkeypatch.setattr(tokens_module, "warn", warned.append)
    encode_dataset(dataset, tiny("bloom"), section(num_workers=1), tmp_path / "audited")
    assert len(calls) == 3 and len(warned) == 1  # two blocks by it alone, one audited; then never again
    assert digests(tmp_path / "audited") == digests(tmp_path / "right")


def test_the_faster_encoders_give_the_same_bytes(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_SMALL_BYTES", 0)
    made = []
    for encoder in (*ENCODERS, None):
        monkeypatch.setattr(tokens_module, "_ENCODERS", (encoder,) if encoder else ())
        encode_dataset(dataset, tiny("bloom"), section(num_workers=1), tmp_path / f"by {encoder}")
        made.append(digests(tmp_path / f"by {encoder}"))
    assert all(one == made[0] for one in made)


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_blocks_are_whole_lines_and_together_the_file(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(tokens_module, "_BLOCK_BYTES", block_bytes)
    content = (dataset / "validation.jsonl").read_bytes().rstrip(b"\n")  # the last line may lack its end
    (dataset / "validation.jsonl").write_bytes(content)
    blocks = list(tokens_module._blocks(dataset / "validation.jsonl"))
    assert b"".join(block.content for block in blocks) == content
    assert all(block.content.endswith(b"\n") for block in blocks[:-1])
    lines_before = np.cumsum([0, *[block.content.count(b"\n") for block in blocks]])
    assert [block.first - 1 for block in blocks] == lines_before[:-1].tolist()
    assert [block.audit for block in blocks] == [False] * (len(blocks) - 1) + [True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": ', "not valid JSON"),
        (b'{"kind": "K", "input": "a", "target": "b"} {}', "not valid JSON"),
        (b'{"kind": "K", "input": "\xff", "target": "b"}', "not valid UTF-8"),
    ],
)
def test_a_damaged_line_is_named(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path, line: bytes, message: str
) -> None:
    with (dataset / "train.jsonl").open("ab") as handle:
        handle.write(line + b"\n")
    with pytest.raises(InputError, match=rf"train\.jsonl, line 2501: {message}"):
        encode_dataset(dataset, tiny("bloom"), section(), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def order(tokens: Tokens, batch_size: int, world_size: int, batches: int, **options: Any) -> str:
    """The hash of the sample-id sequence that all ranks together see."""
    streams = [
        TrainingStream(tokens, batch_size, 3, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    seen = [stream.batch(number).sample_ids for number in range(batches) for stream in streams]
    return hashlib.sha256(repr([one for batch in seen for one in batch]).encode()).hexdigest()


@pytest.mark.parametrize("pack_length", [None, 128])
def test_the_order_is_the_same_for_any_number_of_ranks(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path, pack_length: int | None
) -> None:
    encode_dataset(dataset, tiny("bloom"), section(), tmp_path / "tokens")
    tokens = Tokens.open(tmp_path / "tokens", "validation")
    made = {order(tokens, 8 // ranks, ranks, 20, pack_length=pack_length) for ranks in (1, 2, 4)}
    assert len(made) == 1
    assert made != {order(tokens, 8, 1, 21, pack_length=pack_length)}


def test_an_epoch_of_rows_holds_every_sample_once(
    dataset: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    encode_dataset(dataset, tiny("bloom"), section(), tmp_path / "tokens")
    tokens = Tokens.open(tmp_path / "tokens", "train")
    stream = TrainingStream(tokens, 1, seed=3, pack_length=256)
    epochs = []
    for epoch in range(2):
        batches = [stream.batch(epoch * stream.num_units + number) for number in range(stream.num_units)]
        assert all(len(batch.input_ids) <= 256 for batch in batches)
        epochs.append([number for batch in batches for number in batch.sample_ids])
        assert sorted(epochs[-1]) == list(range(len(tokens)))
    assert epochs[0] != epochs[1]
    again = TrainingStream(tokens, 1, seed=3, pack_length=256)
    assert again.batch(stream.num_units + 5).sample_ids == stream.batch(stream.num_units + 5).sample_ids
    with pytest.raises(InputError, match=r"data\.pack_length = 50 and the longest sample has"):
        TrainingStream(tokens, 1, seed=3, pack_length=50)
