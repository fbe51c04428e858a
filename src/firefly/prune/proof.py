"""The proof that a pruned model is the original restricted to K; it runs before anything takes its final name.

Each claim is checked on the files as written: the tokenizer's stages and merges are the original's; every
kept token is derived again; corpus texts and made-up texts inside K keep their tokens, and all others still
round-trip; the model's part is in `proof_weights.py`. The first disagreement raises `ProofError` naming the
token, text or tensor.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import Model

from firefly.console import progress
from firefly.prune.copying import WeightsCopy
from firefly.prune.counting import batches, encode
from firefly.prune.logits import prove_logits
from firefly.prune.opening import Opener
from firefly.prune.proof_weights import failed, prove_configs, prove_opening, prove_weights
from firefly.prune.sample import Sample
from firefly.prune.scripts import script
from firefly.prune.tokenizer import (
    Json,
    added_tokens,
    guarded,
    load,
    map_stage_ids,
    merge_pairs,
    merge_products,
    read,
    unknown_id,
    vocabulary,
)

AUTO_TEXTS = 200
_GENERATED_TEXTS = 5000
_LONGEST_GENERATED_TOKENS = 8
_SCRIPT_TEXTS = 2000
_OUTSIDE = 0xFFFFFFFF  # in the place of the new id of a dropped token
_ID_BYTES = 4
_AGAIN = "the corpus again"
_Encoded = tuple[list[str], list[bytes], list[bytes]]  # texts; their ids (uint32) before and after
_Rates = dict[str, dict[str, float]]
PROBES = (
    "",
    "a",
    "Hello, world! Don't — “quote” … 3.14 × 10⁻⁹ = №5",
    "天地玄黃，宇宙洪荒。𠮷野家の𠮷、𪚥𪚥、㐂、龘",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇨🇳, 👍🏽, ❤️, 🫠",
    "line one\r\nline two\r\n\r\n\tindented\n\n\n  end  ",
    "\x00\x01\x07\x08\x0b\x0c\x1b[0m\x7f\x85\u200b\u200d\u2028\ufeff\ufffd\U000e0001",
    "e\u0301 é ﬁ Ａ １ ½ ㎏ Å Ω",
    "Привет, мир! Γειά σου. مرحبا بالعالم שלום नमस्ते สวัสดี 안녕하세요 こんにちは გამარჯობა",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # 注释\n",
    "<0x41> <unk> [UNK] ##ing ▁a Ġb </w> \\u4e2d",
    " " * 40 + "a" * 300 + "中" * 100,
)


def prove(
    base: Path,
    pruned: Path,
    new_to_old: NDArray[np.int64],
    names: frozenset[str],
    sample: Sample,
    logits: bool = True,
    *,
    original: tuple[Json, Tokenizer] | None = None,
    opener: Opener | None = None,
    copy: WeightsCopy | None = None,
) -> dict[str, Any]:
    """Run every check on the model directories `base` and `pruned`; returns what was proven, JSON-able.

    Args:
        new_to_old: old id of each new id, [K].
        names: the tensors with vocabulary rows, as the weight files spell them.
        sample: of the corpus.
        logits: also run both models in float32 (see `prove_logits` for the memory).
        original: the base's tokenizer, parsed and loaded, where the caller has it.
        opener, copy: where transformers is made ready, and where the weights are being written and proven.
    """
    return {
        **prove_tokenizer(base, pruned, new_to_old, sample, original=original),
        **prove_opening(base, pruned, new_to_old, sample.texts[:AUTO_TEXTS], opener),
        **prove_configs(base, pruned, new_to_old),
        **(copy.proof() if copy else prove_weights(base, pruned, new_to_old, names)),
        **(prove_logits(base, pruned, new_to_old) if logits else {"logits": "skipped"}),
    }


def prove_tokenizer(
    base: Path,
    pruned: Path,
    new_to_old: NDArray[np.int64],
    sample: Sample,
    generated: int = _GENERATED_TEXTS,
    *,
    original: tuple[Json, Tokenizer] | None = None,
) -> dict[str, Any]:
    """Every check that needs only the two tokenizer.json files; `generated` texts are made up inside K."""
    old = original[0] if original else read(base / "tokenizer.json")
    new = read(pruned / "tokenizer.json")
    prove_stages(old, new, new_to_old)
    whole = original[1] if original else load(base / "tokenizer.json", old)
    restricted = load(pruned / "tokenizer.json", new)
    derived = prove_tokens(whole, restricted, new_to_old)
    made = prove_texts(whole, restricted, new_to_old, made_up_texts(whole, new_to_old, generated))
    prove_texts(whole, restricted, new_to_old, PROBES)
    compared, rates = _prove_sample(whole, restricted, new_to_old, sample)
    return {
        **derived,
        **compared,
        "made_up_texts_checked": made["documents_checked"],
        "made_up_texts_inside": made["documents_inside"],
        **rates,
    }


def prove_stages(old: Json, new: Json, new_to_old: NDArray[np.int64]) -> None:
    """The kept tokens have their new ids, and everything else in the file says what it said before."""
    old_names, new_names = _names(old), _names(new)
    expected = {old_names[old_id]: new_id for new_id, old_id in enumerate(new_to_old.tolist())}
    found = vocabulary(new)
    if found != expected:
        wrong = next(token for token in expected | found if expected.get(token) != found.get(token))
        raise failed(f"the token {wrong!r} has id {found.get(wrong)}, not {expected.get(wrong)}")
    for stage in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
        if old.get(stage) != new.get(stage):
            raise failed(f"the tokenizer's {stage} has changed")
    for stage in ("post_processor", "padding", "added_tokens"):
        if _by_name(stage, old, old_names, expected) != _by_name(stage, new, new_names, expected):
            raise failed(f"the tokenizer's {stage} inserts other tokens than before")
    unknown = unknown_id(old), unknown_id(new)
    if (None if unknown[0] is None else old_names[unknown[0]]) != (
        None if unknown[1] is None else new_names.get(unknown[1])
    ):
        raise failed(f"the unknown token's id is {unknown[1]}, which stands for another token")
    _prove_model(old["model"], new["model"], new_to_old)


def _names(content: Json) -> dict[int, str]:
    """Every token by its id."""
    return {token_id: token for token, token_id in vocabulary(content).items()}


def _by_name(stage: str, content: Json, names: dict[int, str], kept: dict[str, int]) -> Any:
    """A stage of tokenizer.json with tokens in the place of ids."""
    value = json.loads(json.dumps(content.get(stage)))
    if stage == "post_processor":
        map_stage_ids(value, names.__getitem__)
    elif stage == "added_tokens":
        tokens = [{**token, "id": None} for token in added_tokens(content) if token["content"] in kept]
        return sorted(tokens, key=lambda token: str(token["content"]))
    elif value:
        value["pad_id"] = names[value["pad_id"]]
    return value


def _prove_model(before: Json, after: Json, new_to_old: NDArray[np.int64]) -> None:
    """The model's options are the original's; merges (BPE) and scores (Unigram) are those of the kept tokens."""
    for key in (before | after).keys() - {"vocab", "merges", "unk_id"}:
        if before.get(key) != after.get(key):
            raise failed(f"the tokenizer model's {key} has changed")
    if "merges" in before:
        kept = after["vocab"]
        pairs, found = merge_pairs(before), merge_pairs(after)
        products = zip(pairs, merge_products(before, pairs), strict=True)
        wanted = [pair for pair, token in products if token in kept and pair[0] in kept and pair[1] in kept]
        if wanted != found:
            both = enumerate(zip_longest(wanted, found))
            place, (left, right) = next((place, two) for place, two in both if two[0] != two[1])
            raise failed(f"merge {place} of the pruned tokenizer is {right}, not {left}")
    elif isinstance(before["vocab"], list):
        for place, piece in enumerate(after["vocab"]):
            if piece != before["vocab"][new_to_old[place]]:
                raise failed(f"the score of {piece[0]!r} is not the original's")
        if min(piece[1] for piece in before["vocab"]) != min(piece[1] for piece in after["vocab"]):
            raise failed("the lowest score is gone, by which unknown characters are priced")


def prove_tokens(original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64]) -> dict[str, Any]:
    """Every kept token, tokenized by itself: same tokens wherever the original stays inside K.

    A token found by whole-word lookup (`ignore_merges`) is derived by its merges as well; one that continues
    a word is derived behind another kept character.
    """
    models = original.model, pruned.model
    unknown, gives_up = _unknown(original)
    suffix = getattr(models[0], "end_of_word_suffix", None) or ""
    prefix = getattr(models[0], "continuing_subword_prefix", None) or ""
    old_to_new = {old_id: new_id for new_id, old_id in enumerate(new_to_old.tolist())}
    tokens = (models[0].id_to_token(old_id) for old_id in old_to_new)  # None: an added token outside
    strings = [token.removesuffix(suffix) for token in tokens if token]
    if prefix:
        lead = next((string for string in strings if len(string) == 1 and string.isalnum()), "")
        strings = [lead * string.startswith(prefix) + string.removeprefix(prefix) for string in strings]
    lookup = bool(getattr(models[0], "ignore_merges", False))
    derived: set[str] = set()
    for ignore_merges in [True, False] if lookup else [False]:
        for model in models if lookup else ():
            model.ignore_merges = ignore_merges
        for string, before, after in zip(strings, *(_split(model, strings) for model in models), strict=True):
            inside = [old_to_new.get(token_id, -1) for token_id in before]
            if -1 in inside or (gives_up and unknown in before):
                continue  # no text reaches this token through its own string
            if inside != after:
                names = [models[1].id_to_token(token_id) for token_id in after]
                raise failed(f"the token {string!r} now splits into {names}")
            derived.add(string)
    for model in models if lookup else ():
        model.ignore_merges = True
    return {"tokens_kept": len(new_to_old), "tokens_rederived": len(derived)}


def _split(model: Model, strings: list[str]) -> list[list[int]]:
    """The ids that the bare model gives to whole strings."""
    with guarded("tokenizing its own tokens"):
        return [[token.id for token in model.tokenize(string)] for string in strings]


def _unknown(original: Tokenizer) -> tuple[int, bool]:
    """The id of the unknown token (−1: none), and whether one stands for a whole word, as WordPiece has it."""
    kind = type(original.model).__name__
    if kind == "Unigram":  # its state alone tells
        place = json.loads(original.model.__getstate__())["unk_id"]
    else:
        place = original.token_to_id(original.model.unk_token or "")
    return -1 if place is None else place, kind == "WordPiece"


def made_up_texts(
    original: Tokenizer, new_to_old: NDArray[np.int64], count: int, seed: int = 0
) -> Iterator[str]:
    """Random sequences of kept tokens, written out: the same for the same `seed`, most of them inside K."""
    rng = random.Random(seed)
    ids = new_to_old.tolist()
    for start in range(0, count, 1000):
        sequences = [
            rng.choices(ids, k=rng.randint(1, _LONGEST_GENERATED_TOKENS))
            for _ in range(min(1000, count - start))
        ]
        with guarded("decoding made-up texts"):
            yield from original.decode_batch(sequences, skip_special_tokens=True)


def tokens_per_character(sample: Sample, before: list[int], after: list[int]) -> dict[str, _Rates]:
    """How many tokens a character takes before and after, by the script that a text is mostly written in.

    With several corpora also by corpus, on about equally many texts of each. `before` and `after` are the
    numbers of tokens of the texts in `sample`.
    """

    def rates(places: Iterable[int], groups: Iterable[str]) -> _Rates:
        sums: dict[str, list[int]] = {}
        for place, group in zip(places, groups, strict=True):
            entry = sums.setdefault(group, [0, 0, 0])
            for column, amount in enumerate((len(sample.texts[place]), before[place], after[place])):
                entry[column] += amount
        return {
            name: {"characters": size, "before": round(old / size, 4), "after": round(new / size, 4)}
            for name, (size, old, new) in sorted(sums.items())
            if size
        }

    some = range(0, len(sample.texts), len(sample.texts) // _SCRIPT_TEXTS + 1)
    found = {"tokens_per_character": rates(some, [script(sample.texts[place]) for place in some])}
    of_corpus: dict[str, list[int]] = {}
    for place, name in enumerate(sample.names):
        of_corpus.setdefault(name, []).append(place)
    if len(of_corpus) > 1:
        most = _SCRIPT_TEXTS // len(of_corpus) + 1
        parts = {name: places[:: len(places) // most + 1] for name, places in of_corpus.items()}
        found["tokens_per_character_by_corpus"] = rates(
            chain.from_iterable(parts.values()), [name for name, part in parts.items() for _ in part]
        )
    return found


def prove_texts(
    original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64], texts: Iterable[str]
) -> dict[str, Any]:
    """Texts whose original encoding lies in K keep their tokens; the others decode to what they did.

    What decoding may lose is only what was already unknown to the original. A WordPiece model gives up on a
    whole word at its first dead end, so a word unknown to it may become readable with fewer tokens.
    """
    encoded = (
        (batch, encode(original, batch, _AGAIN), encode(pruned, batch, _AGAIN)) for batch in batches(texts)
    )
    total = len(texts) if isinstance(texts, Sequence) else None
    return _compare(original, pruned, new_to_old, encoded, total)


def _prove_sample(
    original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64], sample: Sample
) -> tuple[dict[str, Any], dict[str, _Rates]]:
    """`prove_texts` and `tokens_per_character` of texts that the original has encoded before."""
    before: list[int] = []
    after: list[int] = []

    def encoded() -> Iterator[_Encoded]:
        for batch in batches(sample.texts):
            known = sample.ids[len(before) : len(before) + len(batch)]
            if None in known:
                known = list(encode(original, batch, _AGAIN))
            old_ids, new_ids = [ids for ids in known if ids is not None], encode(pruned, batch, _AGAIN)
            before.extend(len(ids) // _ID_BYTES for ids in old_ids)
            after.extend(len(ids) // _ID_BYTES for ids in new_ids)
            yield batch, old_ids, new_ids

    proven = _compare(original, pruned, new_to_old, encoded(), len(sample.texts))
    return proven, tokens_per_character(sample, before, after)


def _compare(
    original: Tokenizer,
    pruned: Tokenizer,
    new_to_old: NDArray[np.int64],
    encoded: Iterable[_Encoded],
    total: int | None,
) -> dict[str, Any]:
    """The claim of `prove_texts` on batches of texts and their ids by both tokenizers."""
    unknown, gives_up = _unknown(original)
    beyond = int(new_to_old.max()) + 1  # stands for every higher id
    old_to_new = np.full(beyond + 1, _OUTSIDE, dtype=np.uint32)
    old_to_new[new_to_old] = np.arange(len(new_to_old))
    num_texts = num_inside = num_lossless = num_lossy = 0
    with progress("prove texts", total, "documents") as bar:
        for batch, before, after in encoded:
            outside: list[int] = []
            for place, (old_ids, new_ids) in enumerate(zip(before, after, strict=True)):
                old = np.frombuffer(old_ids, dtype=np.uint32)
                expected = old_to_new[np.minimum(old, beyond)]
                if expected.tobytes() == new_ids:
                    continue
                if (expected == _OUTSIDE).any() or (gives_up and unknown in old):
                    outside.append(place)
                else:
                    raise failed(
                        f"the text {batch[place][:200]!r} (sample {num_texts + place}) changes its tokens"
                    )
            decoded = zip(
                outside,
                original.decode_batch(_lists(before, outside), skip_special_tokens=False),
                pruned.decode_batch(_lists(after, outside), skip_special_tokens=False),
                strict=True,
            )
            for place, old_text, new_text in decoded:
                if new_text == old_text:
                    num_lossless += 1
                elif old_text == batch[place] or unknown not in np.frombuffer(before[place], np.uint32):
                    raise failed(
                        f"the text {batch[place][:200]!r} (sample {num_texts + place}) no longer round-trips"
                    )
                else:
                    num_lossy += 1
            num_texts += len(batch)
            num_inside += len(batch) - len(outside)
            bar.advance(len(batch))
    return {
        "documents_checked": num_texts,
        "documents_inside": num_inside,
        "documents_outside_same_text": num_lossless,
        "documents_outside_unknown_before_too": num_lossy,
    }


def _lists(encoded: list[bytes], places: list[int]) -> list[list[int]]:
    """The ids at some places, as decoding wants them."""
    return [np.frombuffer(encoded[place], dtype=np.uint32).tolist() for place in places]
