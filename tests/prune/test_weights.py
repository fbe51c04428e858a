"""Streaming rows: every dtype, hostile files, bounded memory; and the sizes that are told beforehand."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from firefly.errors import ModelError, OutputError, ProofError, RecipeError
from firefly.prune import companions, copying
from firefly.prune.copying import WeightsCopy
from firefly.prune.layout import dry_run, find_layout
from firefly.prune.proof_weights import prove_configs, prove_weights
from firefly.prune.weights import BLOCK_BYTES, INDEX, SINGLE, read_header, select_rows, shards

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(500, 48), (500,), (1, 500), (500, 3, 5)])
def test_rows_of_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(
        0, 256, (int(np.prod(shape)) * dtype.itemsize,), generator=generator, dtype=torch.uint8
    )
    table = raw.view(dtype).reshape(shape)  # any bits: NaN, infinities, negative zero
    other = torch.randn(7, 9)
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    save_file({"table": table, "other": other, "none": torch.zeros(0, 4)}, tmp_path / "base" / SINGLE)
    rows = torch.randperm(500, generator=generator)[:123]
    rows[50:80] = torch.arange(200, 230)
    select_rows(shards(tmp_path / "base"), tmp_path / "out", frozenset({"table"}), rows.numpy())
    after = load_file(tmp_path / "out" / SINGLE)
    expected = table[:, rows] if shape[0] == 1 else table[rows]
    assert after["table"].dtype == dtype and torch.equal(bits(after["table"]), bits(expected))
    assert torch.equal(after["other"], other) and after["none"].shape == (0, 4)
    prove_weights(tmp_path / "base", tmp_path / "out", rows.numpy(), frozenset({"table"}))


def big(folder: Path, num_rows: int, width: int, body_bytes: int, shards_of: int = 1) -> Path:
    """A sparse file of zeros with a large table and a large body: quick to make, and nothing to hold."""
    folder.mkdir()
    parts: list[dict[str, tuple[int, int]]] = [{"embed": (num_rows, width)}, {"body": (1, body_bytes)}]
    parts = parts if shards_of > 1 else [{**parts[0], **parts[1]}]
    weight_map = {}
    for number, part in enumerate(parts):
        header, offset = {}, 0
        name = SINGLE if shards_of == 1 else f"part-{number}.safetensors"
        for tensor, shape in part.items():
            size = shape[0] * shape[1]
            header[tensor] = {"dtype": "U8", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.truncate(8 + len(text) + offset)
    if shards_of > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return folder


def test_a_block_is_smaller_than_a_row_and_a_tensor_larger_than_a_block(tmp_path: Path) -> None:
    base = big(tmp_path / "base", 5, 3 * BLOCK_BYTES + 17, 2 * BLOCK_BYTES + 1)
    with (base / SINGLE).open("r+b") as handle:
        tensor = read_header(base / SINGLE)[0]["embed"]
        for row in range(5):
            handle.seek(tensor.start + (row + 1) * tensor.row_bytes - 1)
            handle.write(bytes([row + 1]))
    (tmp_path / "out").mkdir()
    rows = np.array([3, 0, 1])
    select_rows(shards(base), tmp_path / "out", frozenset({"embed"}), rows)
    assert load_file(tmp_path / "out" / SINGLE)["embed"][:, -1].tolist() == [4, 1, 2]
    prove_weights(base, tmp_path / "out", rows, frozenset({"embed"}))
    with pytest.raises(ProofError, match=r"row 0 of embed is not the original's row 2"):
        prove_weights(base, tmp_path / "out", np.array([2, 0, 1]), frozenset({"embed"}))


def test_memory_is_a_block_however_large_the_model(tmp_path: Path) -> None:
    """A child that copies and proves 1.2 GB may grow by less than 64 MB over one that copies next to nothing."""
    peaks = []
    for name, size in (("small", 1 << 20), ("large", 600 << 20)):
        base = big(tmp_path / name, 20_000, size // 20_000, size, shards_of=2)
        code = f"""
import resource, numpy as np
from pathlib import Path
from firefly import console
from firefly.prune.copying import _run
from firefly.prune.weights import shards
console.quiet()
base, out = Path({str(base)!r}), Path({str(tmp_path / (name + "-out"))!r})
out.mkdir()
_run(shards(base), out, frozenset(["embed"]), np.arange(0, 20_000, 3))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
        shutil.rmtree(base)
        shutil.rmtree(tmp_path / (name + "-out"))
    assert peaks[1] - peaks[0] < 64, peaks


# --- in a process of its own ------------------------------------------------------------------------------


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_OWN_PROCESS_BYTES", 0)


@pytest.mark.usefixtures("own_process")
def test_the_child_writes_proves_and_reports(tmp_path: Path) -> None:
    base, out = big(tmp_path / "base", 50, 8, 100), tmp_path / "out"
    out.mkdir()
    with WeightsCopy(shards(base)) as copy:
        copy.start(out, frozenset({"embed"}), np.array([4, 2]))
        assert copy.proof() == {"tensors_identical": 1, "tensors_row_selected": 1}
    assert load_file(out / SINGLE)["embed"].shape == (2, 8)

    with (
        pytest.raises(OSError, match="nowhere"),
        WeightsCopy(shards(base)) as copy,
    ):
        copy.start(tmp_path / "nowhere", frozenset(), np.array([0]))
        copy.proof()
    files = shards(base)
    (base / SINGLE).write_bytes((base / SINGLE).read_bytes()[:-1])
    with (
        pytest.raises(ModelError, match="not a sound safetensors file"),
        WeightsCopy(files) as copy,
    ):
        copy.start(out, frozenset(), np.array([0]))
        copy.proof()


@pytest.mark.usefixtures("own_process")
def test_a_killed_child_is_one_sentence(tmp_path: Path) -> None:
    base, out = big(tmp_path / "base", 50, 8, 100), tmp_path / "out"
    out.mkdir()
    with (
        pytest.raises(OutputError, match="has died"),
        WeightsCopy(shards(base)) as copy,
    ):
        copy.start(out, frozenset(), np.array([0]))
        copy._child.kill()  # type: ignore[union-attr]
        copy.proof()


# --- hostile files ------------------------------------------------------------------------------------------


def _index(base: Path, weight_map: Any) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors"]
)
def test_index_entries_stay_inside(tmp_path: Path, name: str) -> None:
    base = big(tmp_path / "base", 5, 8, 10, shards_of=2)
    _index(base, {"embed": "part-0.safetensors", "body": name})
    with pytest.raises(ModelError, match="outside its directory"):
        shards(base)


def test_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    base = big(tmp_path / "base", 5, 8, 10, shards_of=2)
    (base / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "part-0.safetensors"}}', "utf-8")
    with pytest.raises(ModelError, match="'a' stands there twice"):
        shards(base)
    _index(base, {"embed": "part-0.safetensors", "body": "part-1.safetensors"})
    shutil.copy(base / "part-0.safetensors", base / "part-1.safetensors")
    with pytest.raises(ModelError, match="holds embed twice"):
        shards(base)
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (base / "twice.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(ModelError, match="not a sound safetensors file"):
        read_header(base / "twice.safetensors")


def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(
        ModelError, match=r"does not open; convert them to safetensors with .*save_pretrained"
    ):
        shards(tmp_path)


# --- configs ----------------------------------------------------------------------------------------------


def test_every_id_field_is_carried_over_and_proven(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    config = {
        "vocab_size": 100,
        "bos_token_id": 10,
        "pad_token_id": -1,
        "eos_token_id": [20, 30],
        "sep_token_id": None,
        "image_token_index": 40,
        "text_config": {"vocab_size": 100, "bos_token_id": 10, "decoder_start_token_id": 20},
        "task_specific_params": {"a": {"forced_bos_token_id": 30, "max_length": 20}},
        "hidden_size": 20,
    }
    generation = {
        "suppress_tokens": [10, 11, 20],
        "begin_suppress_tokens": [11],
        "bad_words_ids": [[10, 11], [20, 30]],
        "force_words_ids": [[10], [20]],
        "forced_decoder_ids": [[1, 10], [2, None]],
        "sequence_bias": [[[10, 20], 1.5], [[11], 2.0]],
        "lang_to_id": {"<|zh|>": 30, "<|xx|>": 11},
        "max_length": 20,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (base / name).write_text(json.dumps(content), "utf-8")
    new_to_old = np.array([5, 10, 20, 30, 40])
    required = companions.required_ids(base, {str(number): number for number in range(100)}, set())
    assert required == {10, 20, 30, 40, 11}  # 11 through lang_to_id alone
    companions.write(base, out, {int(old): new for new, old in enumerate(new_to_old)}, 5)
    found = json.loads((out / "config.json").read_text("utf-8"))
    assert found == {
        **config,
        "vocab_size": 5,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "image_token_index": 4,
        "text_config": {"vocab_size": 5, "bos_token_id": 1, "decoder_start_token_id": 2},
        "task_specific_params": {"a": {"forced_bos_token_id": 3, "max_length": 20}},
    }
    assert json.loads((out / "generation_config.json").read_text("utf-8")) == {
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[2, 3]],
        "force_words_ids": [[1], [2]],
        "forced_decoder_ids": [[1, 1], [2, None]],
        "sequence_bias": [[[1, 2], 1.5]],
        "lang_to_id": {"<|zh|>": 3},
        "max_length": 20,
    }
    prove_configs(base, out, new_to_old)

    def stale(change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
        changed = json.loads(json.dumps(found))
        change(changed)
        (out / "config.json").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(ProofError, match=sentence):
            prove_configs(base, out, new_to_old)

    stale(lambda c: c.update(eos_token_id=[20, 30]), r"eos_token_id is \[20, 30\]")
    stale(lambda c: c.update(eos_token_id=[2, 2]), r"eos_token_id is \[2, 2\]")
    stale(lambda c: c.update(bos_token_id=2), "bos_token_id is 2")
    stale(lambda c: c["text_config"].update(decoder_start_token_id=20), "decoder_start_token_id is 20")
    stale(lambda c: c.update(vocab_size=6), "vocab_size is 6")
    stale(lambda c: c["text_config"].update(vocab_size=6), "vocab_size is 6")
    stale(lambda c: c.update(tie_word_embeddings=False), "other fields: tie_word_embeddings")
    stale(lambda c: c.update(hidden_size=2), "hidden_size is 2")
    stale(lambda c: c.pop("pad_token_id"), "other fields: pad_token_id")


# --- sizes beforehand -------------------------------------------------------------------------------------

# LLMPruner's published ratios at 46,145 tokens, which count the tied head twice, beside the true ones.
BLOOMS = {
    "560m": (1024, 24, 16, 70.96, 62.51),
    "1b1": (1536, 24, 16, 77.13, 70.48),
    "1b7": (2048, 24, 16, 81.14, 75.66),
    "3b": (2560, 30, 32, 86.48, 82.54),
    "7b1": (4096, 30, 32, 90.81, 88.14),
}


@pytest.mark.parametrize("name", BLOOMS)
def test_llmpruners_table_from_configs_alone(tmp_path: Path, name: str) -> None:
    hidden, layers, heads, theirs, true = BLOOMS[name]
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": layers,
        "num_attention_heads": heads,
        "vocab_size": 250880,
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    table = dry_run(tmp_path, 46145)
    assert (table.llmpruner_percent, table.percent) == (theirs, true)
    embeddings = 250880 * hidden
    body = table.params_before - embeddings
    assert table.params_after == body + 46145 * hidden
    assert table.llmpruner_params_after == body + 2 * 46145 * hidden
    assert (table.bytes_before, table.bytes_after) == (2 * table.params_before, 2 * table.params_after)
    assert dry_run(tmp_path, 46145, pad_to_multiple=64).vocab_after == 46208
    with pytest.raises(RecipeError, match="at most"):
        dry_run(tmp_path, 250881)


def test_dry_run_tells_what_pruning_then_does(bases: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("bloom", "qwen3-untied", "qwen3-sharded", "phi"):
        base, out = bases(name), tmp_path / name
        table = dry_run(base, 450)
        out.mkdir()
        files = shards(base)
        layout = find_layout(base, files)
        select_rows(files, out, layout.names, np.arange(450))
        tensors = [tensor for path in files for tensor in read_header(out / path.name)[0].values()]
        assert table.bytes_after == sum(tensor.num_bytes for tensor in tensors)
        assert table.params_after == layout.params_with(450)
        alone = tmp_path / f"{name}-config"
        alone.mkdir()
        shutil.copy(base / "config.json", alone)
        sizes = dry_run(alone, 450)
        assert (sizes.params_before, sizes.params_after) == (table.params_before, table.params_after)
        assert (sizes.bytes_before, sizes.llmpruner_percent) == (table.bytes_before, table.llmpruner_percent)
