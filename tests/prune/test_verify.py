"""Proving again: sound directories pass whoever made them, every mutation fails by its name, nothing is touched."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from firefly import api
from firefly.cli import main
from firefly.errors import ModelError
from firefly.files import sha256_file
from firefly.prune import companions, prune_model
from firefly.prune.idmap import find_id_map
from firefly.prune.layout import find_layout
from firefly.prune.prune import id_ranges
from firefly.prune.tokenizer import read, rebuild, vocabulary
from firefly.prune.verify import VerifyResult, verify
from firefly.prune.vocabulary import BpeDerivation
from firefly.prune.weights import select_rows, shards

Bases = Callable[[str], Path]
Content = dict[str, Any]


def edit(path: Path, change: Callable[[Content], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def details(result: VerifyResult) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.status == "failed"}


@pytest.fixture(scope="module")
def made(
    bases: Bases, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Base and pruned directory by name, pruned once; tests copy what they change."""
    found: dict[str, Path] = {}

    def pair(name: str) -> tuple[Path, Path]:
        base = unigram_base(tmp_path_factory) if name == "unigram" else bases(name)
        if name not in found:
            found[name] = tmp_path_factory.mktemp("made") / name
            alone = name == "unigram"
            prune_model(
                base,
                found[name],
                vocab_size=20 if alone else 450,
                texts=["abc ab"] if alone else texts[:60],
                tokenizer_only=alone,
                prove_logits=False,
            )
        return base, found[name]

    unigrams: list[Path] = []

    def unigram_base(factory: pytest.TempPathFactory) -> Path:
        if not unigrams:
            unigrams.append(factory.mktemp("unigram"))
            rng = random.Random(0)
            pieces = dict.fromkeys("▁abcdef", -6.0)
            pieces |= {"".join(rng.choices("abcdef", k=3)): -float(rng.randint(2, 5)) for _ in range(30)}
            metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
            stages = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
            model = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
            model["vocab"] = [["<unk>", 0.0], *([piece, score] for piece, score in pieces.items())]
            content = {"version": "1.0", **stages, "added_tokens": [], "pre_tokenizer": metaspace}
            content |= {"decoder": metaspace, "model": model}
            (unigrams[0] / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        return unigrams[0]

    return pair


@pytest.mark.parametrize("name", ["bloom", "qwen3-tied", "qwen3-sharded", "phi", "unigram"])
def test_sound_directories_pass(made: Callable[[str], tuple[Path, Path]], name: str) -> None:
    base, pruned = made(name)
    before = {path: sha256_file(path) for path in pruned.iterdir()}
    result = verify(base, pruned)
    assert not result.failed, details(result)
    states = {check.name: check.status for check in result.checks}
    alone = name == "unigram"
    assert states["texts"] == "passed" and states["logits"] == ("skipped" if alone else "passed")
    assert {path: sha256_file(path) for path in pruned.iterdir()} == before


def test_the_wrong_original_fails(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, pruned = made("qwen3-untied")
    result = verify(made("bloom")[0], pruned)
    assert result.failed == ["id map"] and "was not pruned from" in details(result)["id map"]
    assert {check.status for check in result.checks[1:]} == {"skipped"}
    with pytest.raises(ModelError, match="does not exist"):
        verify(pruned, tmp_path / "nowhere")


def test_the_verb_tells_and_ends_with_one(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, pruned = made("bloom")
    command = ["prune", str(base), "--verify", str(pruned), "--skip-logits-proof", "-q"]
    with pytest.raises(SystemExit) as end:
        main(command)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "passed   weights" in shown and "skipped  logits" in shown
    damaged = shutil.copytree(pruned, tmp_path / "damaged")
    edit(damaged / "config.json", lambda config: config.update(eos_token_id=599))
    command[3] = str(damaged)
    with pytest.raises(SystemExit) as end:
        main([*command, "--json"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "configs failed" in said.err and "Traceback" not in said.err
    checks = {check["name"]: check["status"] for check in json.loads(said.out)["checks"]}
    assert checks["configs"] == "failed" and checks["weights"] == "passed"
    again = api.prune_verify(base, damaged, prove_logits=False)
    assert again.failed == ["configs"]


def test_the_corpus_is_read_too(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    base, pruned = made("bloom")
    (tmp_path / "more.txt").write_text("春眠不觉晓\nthe firefly\n", "utf-8")
    plain, more = (verify(base, pruned, corpus=c, logits=False) for c in ([], [tmp_path / "more.txt"]))
    counts = [next(check for check in one.checks if check.name == "texts").detail for one in (plain, more)]
    assert counts[0].startswith("5,012 texts") and counts[1].startswith("5,014 texts")


# --- mutations: each fails, by its name -------------------------------------------------------------------


def drop_closure_token(base: Path, out: Path) -> None:
    """A directory that is sound in all else, of a keep-set that lacks one intermediate."""
    content = read(base / "tokenizer.json")
    derivation = BpeDerivation(content["model"])
    keep = find_id_map(base, out).tolist()
    deep = next(old for old in reversed(keep) if old < 600 and len(derivation.closure(old)) > 3)
    fewer = np.array([old for old in keep if old != derivation.closure(deep)[-2]])
    companions.write(base, out, {int(old): new for new, old in enumerate(fewer)}, len(fewer))
    (out / "tokenizer.json").write_text(json.dumps(rebuild(content, fewer)), "utf-8")
    files = shards(base)
    select_rows(files, out, find_layout(base, files).names, fewer)
    size = sum(path.stat().st_size for path in shards(out))
    changes = {"new_to_old": id_ranges(fewer), "vocab_after": len(fewer), "bytes_after": size}
    edit(out / "prune.json", lambda record: record.update(changes))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], None]:
    def mutate(_: Path, out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return mutate


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    matrix = tensors["model.embed_tokens.weight"]
    matrix[[20, 21]] = matrix[[21, 20]]


def flip_byte(_: Path, out: Path) -> None:
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]
    data[8 + length + entry["data_offsets"][0] + 1] ^= 1
    path.write_bytes(data)


def truncate(_: Path, out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def in_file(name: str, change: Callable[[Content], object]) -> Callable[[Path, Path], None]:
    return lambda _, out: edit(out / name, change)


def stale_eos(base: Path, out: Path) -> None:
    old = json.loads((base / "config.json").read_text("utf-8"))["eos_token_id"]
    edit(out / "config.json", lambda config: config.update(eos_token_id=old))


def swap_merges(content: Content) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def shift_special(content: Content) -> None:
    """The post-processor puts another token in front."""
    content["post_processor"]["special_tokens"]["<s>"]["ids"][0] += 1


def exchange_ids(content: Content) -> None:
    vocab = content["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]


MUTATIONS: dict[str, tuple[str, Callable[[Path, Path], None], str, str]] = {
    "drop one closure token": (
        "qwen3-untied",
        drop_closure_token,
        "kept tokens",
        "the token '.+' now splits into",
    ),
    "swap two rows": (
        "qwen3-untied",
        weights(swap_rows),
        "weights",
        r"row 20 of model\.embed_tokens\.weight",
    ),
    "untie the head": (
        "qwen3-tied",
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "weights",
        r"does not hold the original's tensors \(lm_head\.weight\)",
    ),
    "untie by config": (
        "qwen3-tied",
        in_file("config.json", lambda config: config.update(tie_word_embeddings=False)),
        "configs",
        "tie_word_embeddings is False",
    ),
    "shift one special id": (
        "qwen3-untied",
        in_file("tokenizer.json", shift_special),
        "tokenizer",
        "post_processor inserts other tokens",
    ),
    "exchange two ids": ("qwen3-untied", in_file("tokenizer.json", exchange_ids), "tokenizer", "'.+' has id"),
    "leave eos_token_id stale": ("qwen3-untied", stale_eos, "configs", r"config\.json: eos_token_id is 60\d"),
    "leave one of several eos stale": (
        "qwen3-untied",
        in_file("generation_config.json", lambda config: config["eos_token_id"].__setitem__(1, 599)),
        "configs",
        r"generation_config\.json: eos_token_id is \[",
    ),
    "truncate a shard": (
        "qwen3-sharded",
        truncate,
        "weights",
        r"model-00002-of-.* is not a sound safetensors",
    ),
    "lose a shard": (
        "qwen3-sharded",
        lambda _, out: sorted(out.glob("*.safetensors"))[1].unlink(),
        "weights",
        "lacks the weight file model-00002-of-",
    ),
    "flip a byte": ("qwen3-untied", flip_byte, "weights", r"model\.layers\.1\.mlp\.down_proj\.weight is not"),
    "change one merge's place": (
        "qwen3-untied",
        in_file("tokenizer.json", swap_merges),
        "tokenizer",
        "merge 3 of",
    ),
    "change one Unigram score": (
        "unigram",
        in_file("tokenizer.json", lambda content: content["model"]["vocab"][-1].__setitem__(1, -1.5)),
        "tokenizer",
        "the score of '.+' is not the original's",
    ),
    "a tokenizer of another shape": (
        "qwen3-untied",
        in_file("tokenizer.json", lambda content: content["post_processor"].update(special_tokens=[3])),
        "tokenizer",
        "damaged or of an unknown shape",
    ),
    "no tokenizer": (
        "qwen3-untied",
        lambda _, out: (out / "tokenizer.json").unlink(),
        "texts",
        "has no tokenizer.json",
    ),
    "another size in prune.json": (
        "qwen3-untied",
        in_file("prune.json", lambda record: record.update(vocab_after=449)),
        "record",
        "prune.json says 449 tokens",
    ),
    "another map in prune.json": (
        "qwen3-untied",
        in_file("prune.json", lambda r: r.update(new_to_old=r["new_to_old"].replace("0-", "1,0,2-", 1))),
        "tokenizer",
        "the token '.+' has id",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught_by_name(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    start, mutate, check, sentence = MUTATIONS[name]
    base, pruned = made(start)
    out = shutil.copytree(pruned, tmp_path / "out")
    mutate(base, out)
    found = details(verify(base, out, logits=False))
    assert check in found, found

    assert re.search(sentence, found[check]), found[check]
    assert "no model was written" not in found[check]


# --- directories that other tools made ----------------------------------------------------------------------


def select_by_strings(base: Path, tokenizer: Content, out: Path) -> None:
    """What LLMPruner makes: rows in the given tokenizer's order; head and embeddings both stored, config tied."""
    out.mkdir()
    old, new = vocabulary(read(base / "tokenizer.json")), vocabulary(tokenizer)
    rows = torch.tensor([old[token] for token in sorted(new, key=new.__getitem__)])
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        tensors[name] = tensors[name][rows].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = len(new)
    config.save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    shutil.copy(base / "tokenizer_config.json", out)


@pytest.fixture
def llmpruned(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """BLOOM as the hub stores it, without the prefix of its names, and the same as LLMPruner prunes it."""
    original, pruned = made("bloom")
    base, out = shutil.copytree(original, tmp_path / "base"), tmp_path / "theirs"
    tensors = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    content = read(pruned / "tokenizer.json")
    vocab = content["model"]["vocab"]
    # Their tokenizers have an order of their own behind the special tokens, whose ids stay.
    ids = [token_id for token_id in vocab.values() if token_id > 3]
    shuffled = dict(zip(ids, random.Random(0).sample(ids, len(ids)), strict=True))
    content["model"]["vocab"] = {token: shuffled.get(token_id, token_id) for token, token_id in vocab.items()}
    select_by_strings(base, content, out)
    return base, out


def test_a_directory_of_llmpruner_passes(llmpruned: tuple[Path, Path]) -> None:
    result = verify(*llmpruned)
    assert not result.failed, details(result)
    told = {check.name: check for check in result.checks}
    assert "token strings" in told["id map"].detail and told["record"].status == "skipped"
    assert "the head is stored twice" in told["weights"].detail and told["logits"].status == "passed"


def test_what_llmpruner_may_get_wrong_is_told(llmpruned: tuple[Path, Path], tmp_path: Path) -> None:
    base, theirs = llmpruned

    def fails(check: str, sentence: str, mutate: Callable[[Path], object]) -> None:
        out = shutil.copytree(theirs, tmp_path / "damaged")
        mutate(out)
        found = details(verify(base, out, logits=False))
        assert sentence in found.get(check, ""), found
        shutil.rmtree(out)

    def change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        return lambda out: weights(lambda t: t.update({name: by(t[name])}))(base, out)

    head, inputs = "lm_head.weight", "transformer.word_embeddings.weight"
    fails("weights", f"row 0 of {inputs.removeprefix('transformer.')}", change(head, lambda t: t + 1))
    fails("weights", "row 0 of", change(inputs, lambda t: t.flip(0)))
    fails("weights", f"{inputs} is F16", change(inputs, lambda t: t.half()))
    fails("weights", "transformer.ln_f.bias", change("transformer.ln_f.bias", lambda t: t[:-1].clone()))
    fails(
        "weights", "no weights for", lambda out: weights(lambda t: t.pop("transformer.ln_f.bias"))(base, out)
    )
    fails(
        "configs",
        "eos_token_id is 3",
        lambda out: edit(out / "config.json", lambda c: c.update(eos_token_id=3)),
    )
    fails("configs", "n_head is 2", lambda out: edit(out / "config.json", lambda c: c.update(n_head=2)))
    fails(
        "tokenizer", "merge", lambda out: edit(out / "tokenizer.json", lambda c: c["model"]["merges"].pop(0))
    )


def test_a_tokenizer_that_is_not_closed_fails(
    made: Callable[[str], tuple[Path, Path]], texts: list[str], tmp_path: Path
) -> None:
    """As one trained by itself or cut by frequency is not: the rows are right and texts change all the same."""
    del texts
    base, pruned = made("bloom")
    content = read(base / "tokenizer.json")
    keep = find_id_map(base, pruned).tolist()
    derivation = BpeDerivation(content["model"])
    deep = next(old for old in reversed(keep) if len(derivation.closure(old)) > 3)
    fewer = np.array([old for old in keep if old != derivation.closure(deep)[-2]])
    select_by_strings(base, rebuild(content, fewer), tmp_path / "out")
    result = verify(base, tmp_path / "out", logits=False)
    assert "now splits into" in details(result)["kept tokens"]
    assert next(check for check in result.checks if check.name == "weights").status == "passed"
