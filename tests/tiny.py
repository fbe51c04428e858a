"""Tiny things that tests share: real architectures with random weights, and tokens directories to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PHRASES = (
    "春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少 床前明月光 疑是地上霜 举头望明月 低头思故乡 白日依山尽 黄河入海流 "
    "学而时习之 不亦说乎 有朋自远方来 不亦乐乎 流萤 自然语言处理 模型训练 词表裁剪 今天天气很好 画蛇添足 守株待兔 "
    "the firefly glows in summer while children read short stories about mountains rivers and models"
).split()


def phrases(rng: random.Random, most: int = 8) -> str:
    """A text of a few random phrases."""
    return "，".join(rng.choices(PHRASES, k=rng.randint(1, most)))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of about 500 tokens with BLOOM's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([phrases(rng) for _ in range(300)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


SHAPES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 6},  # six heads: the slopes beyond a power of two are used
    "qwen3": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "sliding_window": 9,
    },
    "gemma": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 96,
    },
    "gemma3_text": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "intermediate_size": 96,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    },
}


def save_model_dir(folder: Path, family: str, **changes: Any) -> Path:
    """A model directory with random weights, written by transformers; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    settings = {"vocab_size": 503, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings, **SHAPES[family], **changes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "embed" in name else 0.15))
    model.save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int = 120, seed: int = 1) -> Path:
    """A firefly-style JSON Lines file of two kinds."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        kind = ("Couplet", "Dictionary")[number % 2]
        rows.append({"kind": kind, "input": f"{number}：{phrases(rng)}", "target": phrases(rng, 5)})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_table(folder: Path, base: Path, source: Path, **train: Any) -> dict[str, Any]:
    """A small recipe that writes into `folder`."""
    return {
        "name": "tiny",
        "output_dir": str(folder),
        "model": {"base": str(base)},
        "data": {
            "max_seq_length": 64,
            "validation_fraction": 0.2,
            "sources": [{"path": str(source), "importer": "firefly"}],
        },
        "train": {
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 4,
            **train,
        },
        "evaluate": {"generations_per_kind": 2},
        "generation": {"max_new_tokens": 8},
    }


def write_preferences(path: Path, count: int = 60, seed: int = 2) -> Path:
    """A JSON Lines file of preferences of two kinds."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        row = {"kind": ("Couplet", "Dictionary")[number % 2], "input": f"{number}：{phrases(rng)}"}
        rows.append(row | {"chosen": phrases(rng, 5), "rejected": f"{phrases(rng, 4)}。{number}"})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
