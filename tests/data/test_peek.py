"""`firefly data peek` shows exactly what training reads, and no bytes can break its output."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.peek import PeekedSample, peek, peek_page, token_viewer, visible
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens, encode_dataset
from firefly.errors import InputError
from firefly.recipe import DataSection
from tiny import phrases, save_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset/, model/ and tokens/; some samples are cut, one has </s> and markup in its text."""
    root, rng = tmp_path_factory.mktemp("peek"), random.Random(5)
    rows: list[dict[str, Any]] = [
        {"kind": "Pairs", "input": phrases(rng, 1 + number % 6), "target": phrases(rng, 1 + number % 40)}
        for number in range(60)
    ]
    rows.append({"kind": "Odd", "input": "<script>x</script> </s> \x1b[31m\r\n🐉", "target": "龘\n[bold]"})
    rows = [row | {"source": f"rows.jsonl:{line}"} for line, row in enumerate(rows, start=1)]
    (root / "dataset").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "dataset" / "train.jsonl").write_text(lines, "utf-8")
    (root / "dataset" / "validation.jsonl").touch()
    (root / "model").mkdir()
    save_tokenizer(root / "model")
    options = {"max_seq_length": 64, "overlong": "right-of-target", "allow_lost_targets": True}
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}]} | options)
    encode_dataset(root / "dataset", root / "model", data, root / "tokens")
    return root


def drawn(run: Path, **options: Any) -> list[PeekedSample]:
    return peek(run / "tokens", ModelTokenizer.load(run / "model"), dataset=run / "dataset", **options)


def mended(shown: str) -> str:
    """Text whose bytes in ⟨…⟩ are characters again."""
    return re.sub(
        "(?:⟨[0-9a-f]{2}⟩)+", lambda match: bytes.fromhex(re.sub("[⟨⟩]", "", match[0])).decode(), shown
    )


def test_it_shows_what_training_reads(run: Path) -> None:
    mapped, show = Tokens.open(run / "tokens", "train"), token_viewer(ModelTokenizer.load(run / "model"))
    samples = drawn(run, num=1000)
    assert [sample.number for sample in samples] == list(range(len(mapped)))
    for shown in samples:
        stored = mapped.sample(shown.number)
        assert [token.text for token in shown.tokens] == [show(number)[0] for number in stored.ids.tolist()]
        assert [token.learned for token in shown.tokens] == stored.mask.astype(bool).tolist()
        assert (shown.num_tokens, shown.num_learned) == (len(stored.ids), int(stored.mask.sum()))
        line = (run / "dataset" / "train.jsonl").read_text("utf-8").splitlines()[stored.origin]
        assert shown.source == json.loads(line)["source"]
        if shown.kind == "Pairs" and shown.whole_tokens is None:
            row = json.loads(line)
            assert (
                mended(shown.plain()).split("\n", 1)[1]
                == f"<s>{row['input']}</s></s>[[{row['target']}</s>]]\n"
            )
    cut = [shown for shown in samples if shown.whole_tokens]
    assert (
        cut and all(s.num_tokens == 64 < (s.whole_tokens or 0) for s in cut) and "cut from" in cut[0].heading
    )


def test_the_mask_on_the_disk_decides(run: Path) -> None:
    """Not a rendering of the dataset: a changed mask shows."""
    path = run / "tokens" / "train" / "mask.bin"
    before, index = path.read_bytes(), (run / "tokens" / "index.json").read_text("utf-8")
    try:
        path.write_bytes(np.zeros(len(before), np.uint8).tobytes())
        table = json.loads(index)
        del table["sha256"]["train/mask.bin"]
        (run / "tokens" / "index.json").write_text(json.dumps(table), "utf-8")
        assert all("[[" not in sample.plain().replace("[[bold", "") for sample in drawn(run, kind="Pairs"))
    finally:
        path.write_bytes(before)
        (run / "tokens" / "index.json").write_text(index, "utf-8")


def test_a_seed_draws_the_same_again(run: Path) -> None:
    assert drawn(run, num=5, seed=1) == drawn(run, num=5, seed=1) != drawn(run, num=5, seed=2)
    assert {sample.kind for sample in drawn(run, num=9, kind="Odd")} == {"Odd"}
    with pytest.raises(InputError, match="did you mean 'Pairs'"):
        drawn(run, kind="Pair")


def test_nothing_in_a_text_is_obeyed(run: Path) -> None:
    (odd,) = drawn(run, kind="Odd")
    plain, page, rich = odd.plain(), peek_page([odd]), odd.coloured().plain
    for text in (plain, rich, page):
        assert "\x1b" not in text and "\r" not in text and "⟨1b⟩" in text and "⟨0d⟩" in text
    assert "🐉" in mended(plain) and "🐉" not in plain  # the tiny vocabulary has only its bytes
    assert "<script>x" not in page and "http" not in page
    assert sum(token.special for token in odd.tokens) == 4  # <s> </s></s> </s>; the typed </s> is text
    assert page.count('<span class="learned') == 1 + odd.num_learned  # one in the key


def test_without_the_dataset_the_line_is_told(run: Path) -> None:
    (sample,) = peek(run / "tokens", ModelTokenizer.load(run / "model"), num=1)
    assert "of the dataset" in sample.source and sample.whole_tokens is None


@given(st.binary(max_size=40))
def test_no_bytes_break_the_output(data: bytes) -> None:
    shown = visible(data)
    shown.encode("utf-8")
    assert all(
        character.isprintable() or character in "\n\xad\u3000" or not character.isascii()
        for character in shown
    )
    assert "\x1b" not in shown


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20))
def test_whole_text_is_shown_as_it_is(text: str) -> None:
    assert visible(text.encode()) == text


@given(number=st.integers(0, 2**32 - 1))
def test_any_id_can_be_shown(run: Path, number: int) -> None:
    text, _ = token_viewer(ModelTokenizer.load(run / "model"))(number)
    assert text
