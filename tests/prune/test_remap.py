"""Carrying over: a remapped tokens directory is what encoding anew gives; a remapped adapter computes the same."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from firefly import api
from firefly.cli import main
from firefly.data.dataset import build_dataset
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import SPLITS, Tokens, encode_dataset
from firefly.errors import FireflyError, InputError, ModelError, OutputError
from firefly.prune import prune_model
from firefly.prune.counting import corpus_texts
from firefly.prune.idmap import find_id_map
from firefly.prune.remap import _Translation, remap
from firefly.recipe import DataSection
from tiny import phrases, save_tokenizer, write_pairs

Tiny = Callable[[str], Path]
CORPUS = ["春眠不觉晓，处处闻啼鸟", "the firefly glows in summer", "今天天气很好，守株待兔"]


def add_tokens(base: Path, count: int) -> None:
    """Make the vocabulary larger by tokens that no merge reaches."""
    content = json.loads((base / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab |= {f"never{number}": len(vocab) + number for number in range(count)}
    (base / "tokenizer.json").write_text(json.dumps(content), "utf-8")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer of more than 2¹⁶ ids, and the same pruned to what `CORPUS` uses."""
    folder = tmp_path_factory.mktemp("remap")
    (folder / "base").mkdir()
    save_tokenizer(folder / "base")
    add_tokens(folder / "base", 1 << 16)
    prune_model(folder / "base", folder / "pruned", coverage=1.0, texts=CORPUS, tokenizer_only=True)
    return folder / "base", folder / "pruned"


def encode(model: Path, source: Path, out: Path, **options: Any) -> Path:
    settings = {"sources": [{"path": str(source), "importer": "firefly"}], "validation_fraction": 0.2}
    data = DataSection.model_validate(settings | options)
    if not (out.parent / "dataset").exists():
        build_dataset(data, out.parent / "dataset")
    encode_dataset(out.parent / "dataset", model, data, out)
    return out


def test_remapping_is_encoding_anew(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, pruned = places
    source = write_pairs(tmp_path / "p.jsonl")
    before = encode(base, source, tmp_path / "before")
    anew = encode(pruned, source, tmp_path / "anew")
    result = remap(base, before, tmp_path / "after", pruned)
    assert (result.kind, result.carried, result.dropped) == ("tokens", 120, [])
    assert 20 < result.changed <= 120  # texts with dropped tokens
    index = json.loads((tmp_path / "after" / "index.json").read_text("utf-8"))
    expected = json.loads((anew / "index.json").read_text("utf-8"))
    assert json.loads((before / "index.json").read_text("utf-8"))["dtype"] == "uint32"
    assert index.pop("remapped_from") == ModelTokenizer.load(base).sha256
    assert index == expected and index["dtype"] == "uint16"
    for split in SPLITS:
        Tokens.open(tmp_path / "after", split, ModelTokenizer.load(pruned).sha256)
        for path in (anew / split).iterdir():
            assert path.read_bytes() == (tmp_path / "after" / split / path.name).read_bytes(), path


def write_tokens(out: Path, base: Path, samples: list[tuple[list[int], list[int]]], longest: int) -> Path:
    """A tokens directory of these (ids, mask) in its train split."""
    index: dict[str, Any] = {
        "samples": {},
        "tokens": {},
        "target_tokens": {},
        "longest_tokens": 0,
        "cuts": {},
    }
    index |= {"kinds": ["K"], "dtype": "uint32", "max_seq_length": longest, "sha256": {}}
    index["tokenizer_sha256"] = ModelTokenizer.load(base).sha256
    for split, own in (("train", samples), ("validation", [])):
        place = out / split
        place.mkdir(parents=True)
        ids = np.array([token for sample, _ in own for token in sample], np.uint32)
        mask = np.array([learn for _, learned in own for learn in learned], np.uint8)
        ids.tofile(place / "tokens.bin")
        mask.tofile(place / "mask.bin")
        np.save(place / "borders.npy", np.cumsum([0, *(len(sample) for sample, _ in own)]))
        for name in ("kinds", "bytes", "origins"):
            np.save(place / f"{name}.npy", np.arange(len(own)) * (name != "kinds"))
        index["samples"][split], index["tokens"][split] = len(own), len(ids)
        index["target_tokens"][split] = int(mask.sum())
    (out / "index.json").write_text(json.dumps(index), "utf-8")
    (out / "rejects.jsonl").write_text("{}\n", "utf-8")
    return out


def test_what_cannot_be_carried_is_told_and_left_out_on_request(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, pruned = places
    tokenizer = ModelTokenizer.load(base)
    inside, outside = tokenizer.encode("春眠不觉晓"), tokenizer.encode("词表裁剪")
    kept = set(find_id_map(base, pruned).tolist())
    assert set(inside) <= kept and not set(outside) <= kept
    half = tokenizer.encode("é")[:1] + outside  # begins in the middle of a character
    samples = [
        ([1, *inside, 2, 2, *outside, 2], [0] * (len(inside) + 3) + [1] * (len(outside) + 1)),
        ([*half, 2], [1] * (len(half) + 1)),
        ([1, *inside, 2], [1] * (len(inside) + 2)),
        ([1, *outside * 40, 2], [1] * (40 * len(outside) + 2)),  # too long when it is tokenized anew
        ([1, 70, 600], [0, 1, 1]),
    ]
    what = write_tokens(tmp_path / "tokens", base, samples, 40 * len(outside) + 2)
    with pytest.raises(InputError, match=r"3 samples .*\(train K, line 2; train K, line 4; .*--drop-outside"):
        remap(base, what, tmp_path / "out", pruned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]
    command = ["prune", str(base), str(tmp_path / "out"), "--remap", str(what), "--pruned", str(pruned)]
    with pytest.raises(SystemExit) as end:
        main([*command, "--drop-outside", "-q"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "2 samples carried over, 1 of them changed" in shown and "dropped  train K, line 5" in shown
    index = json.loads((tmp_path / "out" / "index.json").read_text("utf-8"))
    assert index["cuts"] == {"K": {"outside_vocabulary": 3}} and index["samples"]["train"] == 2
    tokens = Tokens.open(tmp_path / "out", "train", ModelTokenizer.load(pruned).sha256)
    new = ModelTokenizer.load(pruned)
    first, second = tokens.sample(0), tokens.sample(1)
    turns = [*new.encode("春眠不觉晓"), 2, 2, *(answer := new.encode("词表裁剪")), 2]
    assert first.ids.tolist() == [1, *turns] and first.mask.sum() == len(answer) + 1
    assert first.mask[-len(answer) - 1 :].all() and second.ids.tolist()[0] == 1
    assert [first.origin, second.origin] == tokens.target_bytes.tolist() == [0, 2]
    assert (tmp_path / "out" / "rejects.jsonl").is_file()


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_texts_masks_and_special_tokens_stay(places: tuple[Path, Path], rng: random.Random) -> None:
    """Whatever is carried over reads the same, special token by special token, mask by mask."""
    base, pruned = places
    translate = _translation(base, pruned)
    old, new = translate.original, translate.pruned
    ids: list[int] = []
    mask: list[int] = []
    for _ in range(rng.randint(1, 4)):
        piece = [rng.choice([1, 2])] if rng.random() < 0.4 else old.encode(phrases(rng, 3))
        piece = piece[: rng.randint(1, 12)]
        ids += piece
        mask += [rng.randint(0, 1)] * len(piece)
    again = translate.anew(np.array(ids, np.uint32), np.array(mask, np.uint8))
    if again is None:  # only a text that was cut open, or two that stand side by side
        return
    for learn in (0, 1):
        spoken = [token for token, one in zip(ids, mask, strict=True) if one == learn]
        carried = again[0][again[1] == learn].tolist()
        assert new.rust.decode(carried, skip_special_tokens=False) == old.rust.decode(
            spoken, skip_special_tokens=False
        )
    assert [int(t) for t in again[0] if t in (1, 2)] == [token for token in ids if token in (1, 2)]


_made: dict[Path, _Translation] = {}


def _translation(base: Path, pruned: Path) -> _Translation:
    if base not in _made:
        _made[base] = _Translation(base, pruned)
    return _made[base]


def test_what_does_not_belong_together_is_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, pruned = places
    what = write_tokens(tmp_path / "tokens", base, [([1, 2], [0, 1])], 8)

    def refused(error: type[FireflyError], sentence: str, **changes: Path) -> None:
        arguments = {"base": base, "what": what, "out": tmp_path / "out", "pruned": pruned} | changes
        with pytest.raises(error, match=sentence):
            remap(**arguments)
        assert not (tmp_path / "out").exists()

    refused(InputError, "neither a tokens directory .* nor a LoRA adapter", what=base)
    refused(OutputError, "is not empty", out=what)
    (tmp_path / "other").mkdir()
    save_tokenizer(tmp_path / "other")
    refused(ModelError, "was not pruned from", base=tmp_path / "other")
    index = json.loads((what / "index.json").read_text("utf-8"))
    (what / "index.json").write_text(json.dumps(index | {"tokenizer_sha256": "0" * 64}), "utf-8")
    refused(ModelError, "was made with another tokenizer")
    damaged = shutil.copytree(pruned, tmp_path / "damaged")
    huge = json.loads((pruned / "prune.json").read_text("utf-8")) | {"new_to_old": "0-99999999999"}
    for record in (
        json.dumps(huge),
        '{"new_to_old": "0-9"}',
        '{"new_to_old": "x", "source_sha256": {}}',
        "[]",
        "{",
    ):
        (damaged / "prune.json").write_text(record, "utf-8")
        refused(ModelError, r"prune\.json", pruned=damaged)


def test_without_a_record_the_token_strings_tell(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, pruned = places
    bare = shutil.copytree(pruned, tmp_path / "bare", ignore=shutil.ignore_patterns("prune.json"))
    assert find_id_map(base, bare).tolist() == find_id_map(base, pruned).tolist()
    with pytest.raises(ModelError, match=r"65,\d+ tokens that .* lacks, such as '"):
        find_id_map(bare, base)


def test_tokens_are_carried_without_torch(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, pruned = places
    what = write_tokens(tmp_path / "tokens", base, [([1, 2], [0, 1])], 8)
    code = f"""
import sys
from firefly import api, console
console.quiet()
api.prune_remap({str(base)!r}, {str(what)!r}, {str(tmp_path / "out")!r}, pruned={str(pruned)!r})
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and (tmp_path / "out" / "index.json").is_file()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "eos"),
    [
        ("qwen3", "<|im_end|>"),
        ("llama2", "</s>"),
        ("llama3", "<|eot_id|>"),
        ("gemma3", "<eos>"),
        ("gpt2", "<|endoftext|>"),
        ("t5_small", "</s>"),
        ("bert_base_cased", "[SEP]"),
    ],
)
def test_real_tokenizers_carry_real_text_as_if_encoded_anew(
    name: str, eos: str, shared: Path, tmp_path: Path
) -> None:
    base, pruned = tmp_path / "base", tmp_path / "pruned"
    base.mkdir()
    shutil.copy(shared / "tokenizers" / name / "tokenizer.json", base)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    corpora = (("zh_modern_misc", 600), ("en_modern", 200), ("other_languages", 200))
    texts = [
        text
        for corpus, count in corpora
        for text in islice(corpus_texts([shared / "data" / "text" / f"{corpus}.jsonl.zst"]), count)
    ]
    rows = [
        {"kind": "K", "input": one[:300], "target": two[:400]}
        for one, two in zip(texts[::2], texts[1::2], strict=True)
    ]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    prune_model(base, pruned, coverage=0.995, texts=texts[:500], tokenizer_only=True)
    before = encode(base, source, tmp_path / "before", max_seq_length=10_000)
    anew = encode(pruned, source, tmp_path / "anew", max_seq_length=10_000)
    result = remap(base, before, tmp_path / "after", pruned, drop_outside=True)
    assert result.changed > 100
    lossy = name in ("t5_small", "bert_base_cased")  # what was unknown has no text to tokenize anew
    assert len(result.dropped) == 0 or lossy
    for split in SPLITS:
        carried, expected = Tokens.open(tmp_path / "after", split), Tokens.open(anew, split)
        of_origin = {int(origin): number for number, origin in enumerate(expected.origins)}
        assert len(carried) > (0 if lossy else 10)
        for number in range(len(carried)):
            found, wanted = carried.sample(number), expected.sample(of_origin[int(carried.origins[number])])
            assert found.ids.tolist() == wanted.ids.tolist()
            assert found.mask.tolist() == wanted.mask.tolist()


# --- adapters ---------------------------------------------------------------------------------------------

NAMES = {"bloom": ("query_key_value", "word_embeddings"), "qwen3": ("q_proj", "embed_tokens")}
NAMES["llama"] = NAMES["qwen3"]
ADAPTERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "body": lambda body, _: {"target_modules": [body]},
    "saved": lambda body, inputs: {"target_modules": [body], "modules_to_save": [inputs, "lm_head"]},
    "saved inputs": lambda body, inputs: {"target_modules": [body], "modules_to_save": [inputs]},
    "embeddings": lambda body, inputs: {"target_modules": [body, inputs]},
    "head": lambda body, _: {"target_modules": [body, "lm_head"], "lora_bias": True},
    "both": lambda body, inputs: {"target_modules": [body, inputs, "lm_head"]},
    "dora on the head": lambda body, _: {"target_modules": [body, "lm_head"], "use_dora": True},
    "trained tokens": lambda body, _: {"target_modules": [body], "trainable_token_indices": [270, 1, 100]},
    "one trained token": lambda body, inputs: {
        "target_modules": [body],
        "trainable_token_indices": {inputs: [100]},
    },
}


@pytest.fixture(scope="module")
def pruned_models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def pruned(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("pruned") / family
            keep = made[family].parent / "keep.txt"
            tokens = ModelTokenizer.load(tiny(family)).rust
            keep.write_text("\n".join(tokens.id_to_token(token) for token in (270, 1, 100)), "utf-8")
            prune_model(tiny(family), made[family], vocab_size=350, texts=CORPUS, keep_file=keep)
        return made[family]

    return pruned


def save_adapter(base: Path, out: Path, **changes: Any) -> Path:
    """An adapter with random weights, written by peft."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.1))
    model.save_pretrained(out)
    return out


def logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("family", NAMES)
def test_an_adapter_computes_the_same_on_the_pruned_model(
    family: str, name: str, tiny: Tiny, pruned_models: Callable[[str], Path], tmp_path: Path
) -> None:
    base, pruned = tiny(family), pruned_models(family)
    what = save_adapter(base, tmp_path / "adapter", **ADAPTERS[name](*NAMES[family]))
    result = api.prune_remap(base, what, tmp_path / "out", pruned=pruned)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (what, tmp_path / "out"))
    assert before.keys() == after.keys() and result.carried == len(before)
    num_changed = sum(before[key].shape != after[key].shape for key in before)
    assert result.changed == (num_changed or "trained" in name) and (name == "body") == (not result.changed)
    keep = torch.from_numpy(find_id_map(base, pruned))
    ids = torch.randint(0, 350, (3, 17), generator=torch.Generator().manual_seed(1))
    new = torch.tensor([(keep == old).nonzero().item() for old in (270, 1, 100)])
    ids[0, :3] = new
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = logits(base, what, keep[ids])
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=keep[ids]).logits, expected, atol=1e-3)
    torch.testing.assert_close(
        logits(pruned, tmp_path / "out", ids), expected[..., keep], rtol=1e-5, atol=1e-5
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(pruned)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.filterwarnings("ignore")
def test_trained_tokens_outside_are_told_and_left_out_on_request(
    tiny: Tiny, pruned_models: Callable[[str], Path], tmp_path: Path
) -> None:
    base, pruned = tiny("qwen3"), pruned_models("qwen3")
    keep = find_id_map(base, pruned).tolist()
    lost = next(old for old in range(499, 0, -1) if old not in keep)
    for name, tokens in (("some", [lost, 100]), ("all", [lost])):
        what = save_adapter(base, tmp_path / name, target_modules=["q_proj"], trainable_token_indices=tokens)
        with pytest.raises(InputError, match=rf"trains 1 tokens .*token {lost} '.*--drop-outside"):
            remap(base, what, tmp_path / "out", pruned)
        out = tmp_path / f"{name}-out"
        result = remap(base, what, out, pruned, drop_outside=True)
        assert len(result.dropped) == 1
        config = json.loads((out / "adapter_config.json").read_text("utf-8"))
        assert config["trainable_token_indices"] == ([keep.index(100)] if name == "some" else None)
        ids = torch.tensor([[5, keep.index(100), 7]])
        assert logits(pruned, out, ids).shape == (1, 3, 350)
        if name == "some":
            deltas = [load_file(place / "adapter_model.safetensors") for place in (what, out)]
            key = next(key for key in deltas[1] if "trainable_tokens" in key)
            assert torch.equal(deltas[1][key], deltas[0][key][1:])


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_cannot_be_carried_are_refused(
    tiny: Tiny, pruned_models: Callable[[str], Path], tmp_path: Path
) -> None:
    base, pruned = tiny("qwen3"), pruned_models("qwen3")

    def refused(what: Path, sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence):
            remap(base, what, tmp_path / "out", pruned)
        assert not (tmp_path / "out").exists()

    what = save_adapter(base, tmp_path / "dora", target_modules=["embed_tokens"], use_dora=True)
    refused(what, "uses DoRA on model.embed_tokens")
    what = save_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    path = what / "adapter_model.safetensors"
    tensors, config = load_file(path), json.loads((what / "adapter_config.json").read_text("utf-8"))
    name = next(key for key in tensors if "embed_tokens" in key)
    save_file({**tensors, name: torch.zeros(510, 48)}, path)
    refused(what, r"\[510, 48\], without 503 entries .* tokens were added")
    save_file({**tensors, "base_model.model.counts": torch.zeros(503)}, path)
    refused(what, "counts .* may hold something for each token")
    path.write_bytes(path.read_bytes()[:-5])
    refused(what, "not a sound safetensors file")
    path.unlink()
    refused(what, "has no adapter_model.safetensors")
    keep = find_id_map(base, pruned).tolist()
    lost = next(old for old in range(499, 0, -1) if old not in keep)
    save_file(tensors, path)
    for changes, sentence in (
        ({"alora_invocation_tokens": [1, lost]}, "is switched on by the token"),
        ({"peft_type": "PREFIX_TUNING"}, "is a PREFIX_TUNING adapter"),
    ):
        (what / "adapter_config.json").write_text(json.dumps(config | changes), "utf-8")
        refused(what, sentence)
