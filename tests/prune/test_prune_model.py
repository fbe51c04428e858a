"""Whole directories: the pruned model equals the original on K, opens anywhere, and bad input writes nothing."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.errors import FireflyError, InputError, ModelError, OutputError, ProofError, RecipeError
from firefly.files import sha256_file
from firefly.prune import PruneResult, prune_model
from firefly.prune import proof as proofs
from firefly.prune.counting import corpus_texts
from firefly.prune.layout import find_layout
from firefly.prune.prune import id_ranges, parse_id_ranges
from firefly.prune.sample import Sample
from firefly.prune.tokenizer import load, read
from firefly.prune.vocabulary import BpeDerivation, base_symbols
from firefly.prune.weights import shards

Bases = Callable[[str], Path]
NAMES = ["bloom", "qwen3-tied", "qwen3-untied", "qwen3-sharded", "phi"]


def new_to_old_of(folder: Path) -> Any:
    return parse_id_ranges(json.loads((folder / "prune.json").read_text("utf-8"))["new_to_old"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module", params=NAMES)
def pair(
    request: pytest.FixtureRequest, bases: Bases, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, PruneResult]:
    base = bases(request.param)
    out = tmp_path_factory.mktemp("out") / request.param
    return base, out, prune_model(base, out, vocab_size=450, texts=texts[:60])


def test_rows_are_selected_and_everything_else_is_identical(pair: tuple[Path, Path, PruneResult]) -> None:
    base, out, result = pair
    new_to_old = torch.from_numpy(new_to_old_of(out))
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    selected = 0
    for name, tensor in before.items():
        if tensor.shape[0] == result.vocab_before:
            assert torch.equal(tensor[new_to_old], after[name]), name
            selected += 1
        else:
            assert torch.equal(tensor, after[name]), name
    assert selected == {"bloom": 1, "qwen3-tied": 1, "phi": 3}.get(base.name.rstrip("0123456789"), 2)


def test_plain_transformers_opens_it_with_equal_logits(pair: tuple[Path, Path, PruneResult]) -> None:
    base, out, result = pair
    new_to_old = torch.from_numpy(new_to_old_of(out))
    original = AutoModelForCausalLM.from_pretrained(base).eval()
    pruned = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, 450, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(input_ids=new_to_old[ids]).logits[..., new_to_old]
        found = pruned(input_ids=ids).logits
    assert found.shape[-1] == pruned.config.vocab_size == result.vocab_after == 450
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) is tied
    assert result.params_before == sum(parameter.numel() for parameter in original.parameters())
    assert result.params_after == sum(parameter.numel() for parameter in pruned.parameters())
    assert result.proof["logits"] in {"bit-equal", "within float32 error"}


def test_every_id_follows_the_new_vocabulary(pair: tuple[Path, Path, PruneResult]) -> None:
    base, out, _ = pair
    original, pruned = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(pruned, name) == getattr(original, name)
        assert getattr(model.config, f"{name}_id") == getattr(pruned, f"{name}_id")
    generation = model.generation_config
    assert generation.eos_token_id == [pruned.eos_token_id, pruned.pad_token_id]
    assert generation.bad_words_ids[-1] == [pruned.eos_token_id, pruned.pad_token_id]
    suppressed = [original.convert_ids_to_tokens(old) for old in (original.eos_token_id, 300, 599)]
    known = pruned.get_vocab()
    assert generation.suppress_tokens == [known[token] for token in suppressed if token in known]
    # The template processor puts <s> in front, under its new id.
    assert pruned("the firefly")["input_ids"][0] == pruned.bos_token_id == known["<s>"]
    assert len(pruned) == 450 and max(known.values()) == 449
    assert (out / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert not (out / "merges.txt").exists()
    if "qwen3" in base.name:
        assert "<think>" in known and "<unused>" not in known  # the template names the first alone
        assert json.loads((out / "tokenizer_config.json").read_text("utf-8"))[
            "added_tokens_decoder"
        ].keys() == {str(known[token]) for token in ("<unk>", "<s>", "</s>", "<pad>", "<think>")}


def test_result_and_prune_json_tell_the_same(pair: tuple[Path, Path, PruneResult], texts: list[str]) -> None:
    base, out, result = pair
    record = json.loads((out / "prune.json").read_text("utf-8"))
    plain = json.loads(json.dumps(result.to_json()))
    assert {**plain, **record} == {**record, "output": str(out)}
    assert record["source_sha256"]["tokenizer"] == sha256_file(base / "tokenizer.json")
    assert result.documents_checked == result.corpus_documents == 60
    assert (
        result.bytes_after
        == sum(path.stat().st_size for path in out.glob("*.safetensors"))
        < result.bytes_before
    )
    assert sum(result.kept.values()) == 450
    tokenizer, kept = load(base / "tokenizer.json"), set(new_to_old_of(out).tolist())
    used = [
        token_id for text in texts[:60] for token_id in tokenizer.encode(text, add_special_tokens=False).ids
    ]
    assert result.coverage == sum(token_id in kept for token_id in used) / len(used)
    assert result.corpus_tokens == len(used)


def test_two_runs_give_the_same_bytes(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune_model(bases("qwen3-sharded"), tmp_path / name, vocab_size=400, texts=texts, prove_logits=False)
    files = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == files
    for name in files:
        assert sha256_file(tmp_path / "one" / name) == sha256_file(tmp_path / "two" / name), name


@pytest.mark.parametrize("name", ["bloom", "qwen3-untied"])
def test_checkpoints_without_or_with_the_base_prefix(
    bases: Bases, texts: list[str], tmp_path: Path, name: str
) -> None:
    """BLOOM's hub files say `word_embeddings.weight`; the model says `transformer.word_embeddings.weight`."""
    base = shutil.copytree(bases(name), tmp_path / "base")
    prefix = "transformer." if name == "bloom" else "model."
    weights = load_file(base / "model.safetensors")
    renamed = {key.removeprefix(prefix): tensor.clone() for key, tensor in weights.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    result = prune_model(
        base, tmp_path / "out", vocab_size=450, texts=texts[:20], prove_logits=name == "bloom"
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == renamed.keys()
    assert sum(tensor.shape[0] == 450 for tensor in after.values()) == result.proof["tensors_row_selected"]


def test_a_stored_copy_of_a_tied_head_stays_consistent(
    bases: Bases, texts: list[str], tmp_path: Path
) -> None:
    base = shutil.copytree(bases("qwen3-tied"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    prune_model(base, tmp_path / "out", vocab_size=450, texts=texts[:20])
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert after["lm_head.weight"].shape[0] == 450


def test_bfloat16_stays_bfloat16_byte_for_byte(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    base = shutil.copytree(bases("bloom"), tmp_path / "base")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt", "note": "流萤"})
    prune_model(base, tmp_path / "out", vocab_size=450, texts=texts[:20], prove_logits=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    rows = torch.from_numpy(new_to_old_of(tmp_path / "out"))
    for name, tensor in weights.items():
        expected = tensor[rows] if tensor.shape[0] == 607 else tensor
        assert torch.equal(expected.view(torch.int16), after[name].view(torch.int16)), name


def test_keeping_every_row_is_the_identity(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    prune_model(bases("qwen3-untied"), tmp_path / "out", vocab_size=606, texts=texts[:20])
    assert new_to_old_of(tmp_path / "out").tolist() == list(range(606))


def test_keep_file_lines_are_tokens_or_texts(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    base = bases("bloom")
    tokenizer = load(base / "tokenizer.json")
    rare = max(tokenizer.get_vocab().items(), key=lambda item: item[1])[0]
    (tmp_path / "keep.txt").write_text(f"{rare}\n\n流萤 tokenization\n", "utf-8")
    prune_model(
        base,
        tmp_path / "out",
        vocab_size=400,
        texts=texts[:2],
        keep_file=tmp_path / "keep.txt",
        prove_logits=False,
    )
    known = load(tmp_path / "out" / "tokenizer.json").get_vocab()
    assert rare in known and set(tokenizer.encode("流萤 tokenization").tokens) <= known.keys()


# --- the proof catches what could go wrong ---------------------------------------------------------------


@pytest.fixture
def mutable(bases: Bases, texts: list[str], tmp_path: Path) -> Callable[[], None]:
    """A pruned model to damage (in `tmp_path/out`), and the proof of it as one call."""
    base, out = bases("qwen3-untied"), tmp_path / "out"
    prune_model(base, out, vocab_size=450, texts=texts, prove_logits=False)
    new_to_old = new_to_old_of(out)
    names = find_layout(base, shards(base)).names

    def prove() -> None:
        proofs.prove(base, out, new_to_old, names, Sample(texts), logits=False)

    prove()
    return prove


def test_swapped_rows_are_caught(mutable: Callable[[], None], bases: Bases, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][[20, 21]] = weights["lm_head.weight"][[21, 20]]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"row 20 of lm_head\.weight"):
        mutable()
    with pytest.raises(ProofError, match="logits differ"):
        proofs.prove_logits(bases("qwen3-untied"), tmp_path / "out", new_to_old_of(tmp_path / "out"))


def test_one_flipped_bit_is_caught(mutable: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]
    data[8 + length + entry["data_offsets"][0] + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProofError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        mutable()


def _edit_tokenizer(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def test_reordered_merges_are_caught(mutable: Callable[[], None], tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        merges[3], merges[4] = merges[4], merges[3]

    _edit_tokenizer(tmp_path / "out" / "tokenizer.json", swap)
    with pytest.raises(ProofError, match="merge 3"):
        mutable()


@pytest.mark.usefixtures("mutable")
def test_reversed_merges_change_tokens_and_texts(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out" / "tokenizer.json"
    _edit_tokenizer(path, lambda content: content["model"]["merges"].reverse())
    original, pruned = load(bases("qwen3-untied") / "tokenizer.json"), load(path)
    with pytest.raises(ProofError, match="now splits into"):
        proofs.prove_tokens(original, pruned, new_to_old_of(tmp_path / "out"))
    with pytest.raises(ProofError, match="changes its tokens"):
        proofs.prove_texts(original, pruned, new_to_old_of(tmp_path / "out"), texts)


def test_a_dropped_stage_is_caught(mutable: Callable[[], None], tmp_path: Path) -> None:
    _edit_tokenizer(
        tmp_path / "out" / "tokenizer.json", lambda content: content["pre_tokenizer"].update(use_regex=False)
    )
    with pytest.raises(ProofError, match="pre_tokenizer"):
        mutable()


def test_a_lossy_tokenizer_is_caught(bases: Bases) -> None:
    base = bases("qwen3-untied")
    content = read(base / "tokenizer.json")
    from firefly.prune.tokenizer import rebuild

    lost = content["model"]["vocab"]["Ã"]  # one byte symbol (0xC3, of é)
    keep = np.array([old for old in range(606) if old != lost])
    with pytest.raises(ProofError, match="no longer round-trips"):
        proofs.prove_texts(load(base / "tokenizer.json"), load(rebuild(content, keep)), keep, ["café"])


def test_a_missing_closure_intermediate_stops_pruning(
    bases: Bases, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its intermediates a kept token cannot be built; nothing may be written then."""
    whole = BpeDerivation.closure

    def open_closure(self: BpeDerivation, token_id: int) -> list[int]:
        return [part for part in whole(self, token_id) if part == token_id or len(self.tokens[part]) != 2]

    base, out = bases("bloom"), tmp_path / "out"
    content = read(base / "tokenizer.json")
    assert base_symbols(content) <= set(range(600))
    monkeypatch.setattr(BpeDerivation, "closure", open_closure)
    with pytest.raises(ProofError, match="now splits into"):
        prune_model(base, out, vocab_size=330, texts=texts[:5], prove_logits=False)
    assert list(tmp_path.iterdir()) == []


# --- bad input: one clear sentence, nothing written ------------------------------------------------------


def _no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def _pickles(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def _bad_header(base: Path) -> None:
    data = bytearray((base / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (base / "model.safetensors").write_bytes(data)


def _truncated(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])


def _outside(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../secret.safetensors"}}', "utf-8"
    )


def _absent_shard(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}', "utf-8")


def _word_level(base: Path) -> None:
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1}}
    _edit_tokenizer(base / "tokenizer.json", lambda content: content.update(model=model))


def _hostile(base: Path) -> None:
    _edit_tokenizer(base / "tokenizer.json", lambda content: content["model"]["merges"].append(["Ċ", "Ã"]))


def _renumbered(base: Path) -> None:
    _edit_tokenizer(base / "tokenizer.json", lambda content: content["added_tokens"][-1].update(id=606))


def _unknown_model(base: Path) -> None:
    _edit_tokenizer(base / "config.json", lambda content: content.update(model_type="nonsense", auto_map={}))


def _few_rows(base: Path) -> None:
    _edit_tokenizer(base / "config.json", lambda content: content.update(vocab_size=605))
    weights = load_file(base / "model.safetensors")
    cut = {
        name: tensor[:605].clone() if tensor.shape[0] == 613 else tensor for name, tensor in weights.items()
    }
    save_file(cut, base / "model.safetensors")


def _other_rows(base: Path) -> None:
    _edit_tokenizer(base / "config.json", lambda content: content.update(vocab_size=640))


def _extra_vocabulary_tensor(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["frequency_bias"] = torch.zeros(613)
    save_file(weights, base / "model.safetensors")


def _bias_by_id(base: Path) -> None:
    _edit_tokenizer(base / "generation_config.json", lambda content: content.update(sequence_bias=[5]))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_weights, "has no weights"),
        (_pickles, "save_pretrained"),
        (_no_tokenizer, "has no tokenizer.json"),
        (_bad_header, "not a sound safetensors file"),
        (_truncated, "not a sound safetensors file"),
        (_outside, "outside its directory"),
        (_absent_shard, "lacks the weight file"),
        (_word_level, "is a WordLevel tokenizer"),
        (_hostile, "which is not in the vocabulary"),
        (_renumbered, "has id 606 in the file"),
        (_unknown_model, "does not describe a language model"),
        (_few_rows, "only 605 rows"),
        (_other_rows, "do not belong together"),
        (_extra_vocabulary_tensor, "frequency_bias"),
        (_bias_by_id, "sequence_bias"),
    ],
)
def test_damaged_bases_are_refused(
    bases: Bases, texts: list[str], tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    base = shutil.copytree(bases("qwen3-untied"), tmp_path / "base")
    damage(base)
    with pytest.raises(ModelError, match=sentence) as caught:
        prune_model(base, tmp_path / "out", vocab_size=450, texts=texts[:5], prove_logits=False)
    assert "\n" not in str(caught.value)[:80]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bad_arguments_are_refused(bases: Bases, texts: list[str], tmp_path: Path) -> None:
    base, out = bases("bloom"), tmp_path / "out"

    def refused(error: type[FireflyError], sentence: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "base": base,
            "out": out,
            "vocab_size": 450,
            "texts": texts[:5],
            **changes,
        }
        with pytest.raises(error, match=sentence):
            prune_model(**arguments)
        assert not out.exists()

    refused(ModelError, "does not exist", base=tmp_path / "nowhere")
    refused(InputError, "holds no tokens", texts=[])
    refused(InputError, "does not exist", corpus=[tmp_path / "nowhere.txt"])
    refused(InputError, "holds no file of a known kind", corpus=[tmp_path])
    refused(RecipeError, "at least", vocab_size=20)
    refused(RecipeError, "at most", vocab_size=20_000)
    refused(OutputError, "is the base model itself", out=base)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine", "utf-8")
    refused(OutputError, "no pruned model", out=tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text("utf-8") == "mine"


def test_an_earlier_result_survives_a_failure_and_is_replaced_by_success(
    bases: Bases, texts: list[str], tmp_path: Path
) -> None:
    base, out = bases("bloom"), tmp_path / "out"
    prune_model(base, out, vocab_size=450, texts=texts[:5], prove_logits=False)
    before = sha256_file(out / "prune.json")
    with pytest.raises(RecipeError):
        prune_model(base, out, vocab_size=5, texts=texts[:5], prove_logits=False)
    assert sha256_file(out / "prune.json") == before
    assert prune_model(base, out, vocab_size=440, texts=texts[:5], prove_logits=False).vocab_after == 440
    assert len(new_to_old_of(out)) == 440


# --- corpus ----------------------------------------------------------------------------------------------


def test_corpus_shapes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", "utf-8")
    (tmp_path / "b.txt").write_text("first\nline\n\n\nsecond\n", "utf-8")
    records: list[dict[str, Any]] = [
        {"text": "文", "source": "x"},
        {"kind": "Couplet", "input": "上联", "target": "下联"},
        {
            "kind": "Chat",
            "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}],
        },
        {"conversation": [{"human": "问", "assistant": "答"}]},
    ]
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(json.dumps(record) for record in records))
    (tmp_path / "picture.png").write_bytes(b"\x00")
    expected = ["one", "two", "first\nline", "second", "文", "上联", "下联", "你好", "好", "问", "答"]
    assert list(corpus_texts([tmp_path])) == expected
    assert list(corpus_texts([tmp_path / "a.txt"])) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [('{"text": 1', "line 2: not valid JSON"), ('{"text": ""}', "line 2: the record holds no text")],
)
def test_bad_corpus_lines_are_named(bases: Bases, tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "好"}\n' + line, "utf-8")
    with pytest.raises(InputError, match=sentence):
        prune_model(bases("bloom"), tmp_path / "out", vocab_size=450, corpus=[tmp_path / "bad.jsonl"])
    (tmp_path / "list.doc").write_text("a", "utf-8")
    with pytest.raises(InputError, match="cannot tell the format"):
        list(corpus_texts([tmp_path / "list.doc"]))


def test_id_ranges_read_back() -> None:
    ids = np.array([0, 1, 2, 7, 9, 10, 5])
    assert id_ranges(ids) == "0-2,7,9-10,5"
    assert parse_id_ranges(id_ranges(ids)).tolist() == ids.tolist()
