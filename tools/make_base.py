"""Make the seed of the embedded base: a byte-level BPE over the pre-training text, and random BLOOM weights.

    python tools/make_base.py --corpus out/corpus --out out/seed

Every Chinese character is a token of its own: a line of verse then has as many tokens as characters, and which tone and
rhyme a token has is a fact about one character, which is what a model this small can learn.

`firefly train src/firefly/demo/pretrain.toml` then trains it; see src/firefly/demo/README.md for every step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomForCausalLM

from firefly.data.chatformat import open_format
from firefly.data.tokenizer import ModelTokenizer
from firefly.files import read_json_lines

TEXTS = ("chinese", "english", "others", "verse")
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
"""BLOOM's pre-tokenizer: a run without white space and without the punctuation of its languages."""


def texts(folder: Path) -> Iterator[str]:
    for name in TEXTS:
        for _, record in read_json_lines(folder / f"{name}.jsonl"):
            yield record["text"]


def make_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE shaped like BLOOM's, with Chinese characters apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Split(Regex(BLOOM_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        max_token_length=12,
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts(folder), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help="what make_corpus.py wrote")
    source.add_argument("--tokenizer", type=Path, help="an earlier result, to take the tokenizer from")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(options.corpus, options.vocab_size)
    tokenizer.save(str(options.out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (options.out / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    chat_format = open_format("firefly", ModelTokenizer.load(options.out))
    (options.out / "chat_template.jinja").write_text(chat_format.template, encoding="utf-8")

    torch.manual_seed(options.seed)
    config = BloomConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden_size,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        use_cache=True,
    )
    model = BloomForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(options.out)
    print(f"{options.out}: {tokenizer.get_vocab_size():,} tokens, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
