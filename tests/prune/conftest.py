"""Tiny base models for the pruning tests: real architectures, a freshly trained byte-level BPE, random weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from firefly.console import quiet

_CHINESE = """
春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少 床前明月光 疑是地上霜 举头望明月 低头思故乡 白日依山尽 黄河入海流
学而时习之 不亦说乎 有朋自远方来 不亦乐乎 天行健 君子以自强不息 流萤 自然语言处理 模型训练 词表裁剪 今天天气很好
画蛇添足 守株待兔 亡羊补牢 掩耳盗铃 对牛弹琴
"""
_ENGLISH = """
the firefly glows in a summer night while children learn to read short stories about mountains rivers
and models training tokenization vocabulary pruning exact nothing international
"""


def make_texts(count: int = 400, seed: int = 0) -> list[str]:
    """Documents of random Chinese and English phrases."""
    rng = random.Random(seed)
    return [
        "，".join(rng.choices(_CHINESE.split(), k=rng.randint(1, 4)))
        + "。"
        + " ".join(rng.choices(_ENGLISH.split(), k=rng.randint(0, 8)))
        for _ in range(count)
    ]


def train_tokenizer(texts: list[str], inside: bool) -> Tokenizer:
    """A byte-level BPE of 600 tokens; special tokens lie inside the model's vocabulary, or behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special if inside else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not inside:
        tokenizer.add_special_tokens(special)
        # One added token that the chat template names, and one that nothing needs.
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<unused>", special=False)])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def save_base(folder: Path, family: str, tokenizer: Tokenizer, **changes: Any) -> Path:
    """Save a random tiny model of `family` with its tokenizer; rows are padded beyond the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    bos, eos, pad = (tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<pad>"))
    common = {
        "vocab_size": tokenizer.get_vocab_size() + 7,
        "hidden_size": 32,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    shapes: dict[str, dict[str, Any]] = {
        "bloom": {"n_layer": 2, "n_head": 4},
        "qwen3": {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
        },
        "phi": {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    }
    torch.manual_seed(0)
    save = {key: changes.pop(key) for key in ("max_shard_size",) if key in changes}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **common, **shapes[family], **changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that every tensor is told apart
            parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = [eos, pad]
    model.generation_config.suppress_tokens = [eos, 300, 599]
    model.generation_config.bad_words_ids = [[599], [eos, pad]]
    model.save_pretrained(folder, **save)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content["added_tokens"]
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "chat_template.jinja").write_text("<think>{{ messages[0]['content'] }}", "utf-8")
    (folder / "merges.txt").write_text("stale", "utf-8")
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="session")
def content(texts: list[str]) -> dict[str, Any]:
    """A parsed tokenizer.json with added tokens behind the model's vocabulary."""
    return json.loads(train_tokenizer(texts, inside=False).to_str())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[[str], Path]:
    """Base model directories by name, each made once; tests must not change them."""
    quiet()
    made: dict[str, Path] = {}
    inside, behind = train_tokenizer(texts, inside=True), train_tokenizer(texts, inside=False)
    recipes: dict[str, tuple[str, Tokenizer, dict[str, Any]]] = {
        "bloom": ("bloom", inside, {}),
        "qwen3-tied": ("qwen3", behind, {"tie_word_embeddings": True}),
        "qwen3-untied": ("qwen3", behind, {"tie_word_embeddings": False}),
        "qwen3-sharded": ("qwen3", behind, {"tie_word_embeddings": False, "max_shard_size": "60KB"}),
        "phi": ("phi", behind, {}),
    }

    def base(name: str) -> Path:
        if name not in made:
            family, tokenizer, changes = recipes[name]
            made[name] = save_base(tmp_path_factory.mktemp(name), family, tokenizer, **dict(changes))
        return made[name]

    return base
