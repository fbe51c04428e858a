"""Every family of models: the vocabulary's tensors are found, selected, proven, and run with equal logits.

These tests hand the weight layer a list of old ids, so they need no tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from firefly.errors import ModelError, ProofError
from firefly.prune import companions
from firefly.prune.layout import (
    _PLAIN,
    Layout,
    dry_run,
    find_layout,
    inspected_layout,
    plain_layout,
    read_config,
)
from firefly.prune.logits import prove_logits
from firefly.prune.opening import Opener
from firefly.prune.proof_weights import prove_configs, prove_weights
from firefly.prune.weights import read_header, select_rows, shards

ROWS = 293
# In old order at first, then an added token that lay in front: rows need not be ascending.
NEW_TO_OLD = np.array([0, 1, 2, 3, 5, *range(40, 150), 200, 201, 249, 260, 4], dtype=np.int64)
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 200,
    "forced_eos_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 200}
_BERT = {**_SMALL, "type_vocab_size": 2}
_GEMMA3 = {
    "text_config": {**_SMALL, "vocab_size": ROWS, "model_type": "gemma3_text", "sliding_window": 16, **_IDS},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 249,
    "boi_token_index": 260,
    "eoi_token_index": 5,
    "vocab_size": None,
}
# name → (model_type, class, config, names of the tensors in the file that follow the vocabulary, by their ends)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "bloom": (
        "bloom",
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        {"word_embeddings.weight"},
    ),
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"wte.weight"},
    ),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", _SMALL, {"embed_in.weight", "embed_out.weight"}),
    "llama": ("llama", "LlamaForCausalLM", _SMALL, {"embed_tokens.weight", "lm_head.weight"}),
    "llama-tied": (
        "llama",
        "LlamaForCausalLM",
        {**_SMALL, "tie_word_embeddings": True},
        {"embed_tokens.weight"},
    ),
    "mistral": ("mistral", "MistralForCausalLM", _SMALL, {"embed_tokens.weight", "lm_head.weight"}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _SMALL, {"embed_tokens.weight", "lm_head.weight"}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _SMALL, {"embed_tokens.weight", "lm_head.weight"}),
    "qwen3-tied": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**_SMALL, "tie_word_embeddings": True},
        {"embed_tokens.weight"},
    ),
    "gemma": ("gemma", "GemmaForCausalLM", _SMALL, {"embed_tokens.weight"}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _SMALL, {"embed_tokens.weight"}),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _SMALL, {"embed_tokens.weight"}),
    "gemma3-vision": ("gemma3", "Gemma3ForConditionalGeneration", _GEMMA3, {"embed_tokens.weight"}),
    "phi": ("phi", "PhiForCausalLM", _SMALL, {"embed_tokens.weight", "lm_head.weight", "lm_head.bias"}),
    "t5": ("t5", "T5ForConditionalGeneration", _T5, {"shared.weight"}),
    "t5-untied": (
        "t5",
        "T5ForConditionalGeneration",
        {**_T5, "tie_word_embeddings": False},
        {"shared.weight", "lm_head.weight"},
    ),
    "mt5": (
        "mt5",
        "MT5ForConditionalGeneration",
        {**_T5, "tie_word_embeddings": False},
        {"shared.weight", "lm_head.weight"},
    ),
    "bart": ("bart", "BartForConditionalGeneration", _BART, {"shared.weight", "final_logits_bias"}),
    "mbart": ("mbart", "MBartForConditionalGeneration", _BART, {"shared.weight", "final_logits_bias"}),
    "bert": ("bert", "BertForMaskedLM", _BERT, {"word_embeddings.weight", "predictions.bias"}),
    "xlm-roberta": (
        "xlm-roberta",
        "XLMRobertaForMaskedLM",
        _BERT,
        {"word_embeddings.weight", "lm_head.bias"},
    ),
    "bert-encoder": ("bert", "BertModel", _BERT, {"word_embeddings.weight"}),
}
Base = Callable[[str], Path]


def make(folder: Path, model_type: str, name: str, changes: dict[str, Any], **save: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{"vocab_size": ROWS, **({} if model_type == "gemma3" else _IDS), **changes}
    )
    model = getattr(transformers, name)(config).eval()
    if changes.get("tie_word_embeddings") is False and name.endswith("T5ForConditionalGeneration"):
        # As in T5 1.1 and mT5: transformers ties by itself, and lets a head that differs in the file be.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0, 0.3)
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp(name), *FAMILIES[name][:3])
        return made[name]

    return base


def cut(base: Path, out: Path, new_to_old: Any = NEW_TO_OLD) -> Layout:
    """The weight layer's part of pruning."""
    out.mkdir()
    files = shards(base)
    layout = find_layout(base, files)
    companions.write(base, out, {int(old): new for new, old in enumerate(new_to_old)}, len(new_to_old))
    select_rows(files, out, layout.names, new_to_old)
    return layout


def ends(names: Any) -> set[str]:
    """The last part of a name, or the last two where the last is just 'weight' or 'bias'."""
    return {name if name.count(".") == 0 else ".".join(name.split(".")[-2:]) for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_pruned_exactly(family: Base, tmp_path: Path, name: str) -> None:
    base, out = family(name), tmp_path / "out"
    layout = cut(base, out)
    expected = FAMILIES[name][3]
    assert expected <= ends(layout.names) and layout.num_rows == ROWS
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert layout.names == {key for key, tensor in before.items() if ROWS in tensor.shape}
    for key, tensor in before.items():
        if key in layout.names:
            tensor = tensor[..., NEW_TO_OLD] if tensor.shape[0] == 1 else tensor[NEW_TO_OLD]
        assert torch.equal(after[key], tensor), key

    assert prove_weights(base, out, NEW_TO_OLD, layout.names)["tensors_row_selected"] == len(layout.names)
    assert prove_configs(base, out, NEW_TO_OLD)["config_ids"] > 0
    cls = getattr(transformers, FAMILIES[name][1])
    original, pruned = cls.from_pretrained(base), cls.from_pretrained(out)
    assert layout.params == original.num_parameters()
    assert layout.params_with(len(NEW_TO_OLD)) == pruned.num_parameters()
    result = prove_logits(base, out, NEW_TO_OLD, streamed=False)
    assert result["logits"] in {"bit-equal", "within float32 error"}
    outputs = original.get_output_embeddings()
    if outputs is not None:
        tied = outputs.weight is original.get_input_embeddings().weight
        assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) is tied


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda one: str(one)[6:]
)
@pytest.mark.parametrize("size", ["5GB", "12KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("tied")])
def test_every_family_tied_or_not_in_one_file_or_many_in_every_dtype(
    tmp_path: Path, name: str, tied: bool, size: str, dtype: torch.dtype
) -> None:
    model_type, cls, changes, _ = FAMILIES[name]
    changes = {**changes, "tie_word_embeddings": tied}
    if "text_config" in changes:
        changes["text_config"] = {**changes["text_config"], "tie_word_embeddings": tied}
    base = make(tmp_path / "base", model_type, cls, changes, max_shard_size=size, dtype=dtype)
    assert len(shards(base)) == 1 if size == "5GB" else len(shards(base)) > 3
    out = tmp_path / "out"
    layout = cut(base, out)
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys() and layout.names == {
        key for key, tensor in before.items() if ROWS in tensor.shape
    }
    for key, tensor in before.items():
        if key in layout.names:
            tensor = tensor[..., NEW_TO_OLD] if tensor.shape[0] == 1 else tensor[NEW_TO_OLD]
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    prove_weights(base, out, NEW_TO_OLD, layout.names)
    prove_configs(base, out, NEW_TO_OLD)
    prove_logits(base, out, NEW_TO_OLD, streamed=False)
    pruned = getattr(transformers, cls).from_pretrained(out)
    assert layout.params_with(len(NEW_TO_OLD)) == pruned.num_parameters()
    outputs = pruned.get_output_embeddings()
    if outputs is not None:
        assert (outputs.weight is pruned.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    "name",
    [
        "bloom",
        "gpt2",
        "gpt_neox",
        "llama",
        "gemma3",
        "gemma3-vision",
        "t5",
        "mt5",
        "mbart",
        "bert",
        "bert-encoder",
    ],
)
def test_streamed_logits_agree_with_whole_models(family: Base, tmp_path: Path, name: str) -> None:
    base, out = family(name), tmp_path / "out"
    cut(base, out)
    if name == "gemma3-vision":  # transformers renames tensors while it loads this one
        with pytest.raises(ModelError, match="stored in another form"):
            prove_logits(base, out, NEW_TO_OLD, streamed=True)
        return
    assert "(streamed)" in prove_logits(base, out, NEW_TO_OLD, streamed=True)["logits"]
    weights = load_file(out / "model.safetensors")
    changed = next(
        key for key in weights if re.search(r"(shared|wte|embed_in|embed_tokens|word_embeddings)\.", key)
    )
    weights[changed][[7, 8]] = weights[changed][[8, 7]]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="logits differ"):
        prove_logits(base, out, NEW_TO_OLD, streamed=True)


# --- the fast way and the thorough way agree ---------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_PLAIN))
@pytest.mark.parametrize("tied", [None, True, False])
def test_plain_families_are_as_their_architecture_says(tmp_path: Path, name: str, tied: bool | None) -> None:
    """Also where config.json leaves the tie unsaid, as hub files do."""
    changes: dict[str, Any] = dict(_SMALL) if name != "bloom" else FAMILIES["bloom"][2]
    cls = transformers.AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))].__name__
    base = make(
        tmp_path / "base", name, cls, changes if tied is None else {**changes, "tie_word_embeddings": tied}
    )
    if tied is None:
        config = read_config(base)
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = list(read_header(base / "model.safetensors")[0].values())
    plain = plain_layout(read_config(base), tensors)
    assert plain is not None
    layout, groups = inspected_layout(base, tensors)
    assert plain[0] == layout
    assert {frozenset(one.name for one in group) for group in plain[1]} == {
        frozenset(one.name for one in group) for group in groups
    }


def test_a_tied_copy_counts_once_and_a_different_one_twice(family: Base, tmp_path: Path) -> None:
    for name in ("qwen3-tied", "t5"):
        base = shutil.copytree(family(name), tmp_path / name)
        weights = load_file(base / "model.safetensors")
        matrix = next(tensor for tensor in weights.values() if tensor.shape[0] == ROWS)
        params = find_layout(base, shards(base)).params
        for stored, more in ((matrix.clone(), 0), (matrix + 1, matrix.numel())):
            save_file(
                {**weights, "lm_head.weight": stored}, base / "model.safetensors", metadata={"format": "pt"}
            )
            layout = find_layout(base, shards(base))
            assert (layout.params, len(layout.names)) == (params + more, 2)
            assert layout.params_per_row == matrix.shape[1] * (2 if more else 1)
            if name == "t5":
                model = transformers.T5ForConditionalGeneration.from_pretrained(base)
                assert model.num_parameters() == layout.params if more else params


def test_pruning_imports_neither_torch_nor_transformers_for_plain_families() -> None:
    code = "import sys, firefly.prune.layout, firefly.prune.weights, firefly.prune.proof_weights, firefly.prune.logits;"
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- what is refused ------------------------------------------------------------------------------------


def refused(base: Path, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        find_layout(base, shards(base))


def test_per_layer_embeddings_are_refused(tmp_path: Path) -> None:
    """Gemma 3n has a second table, [tokens, layers × width], whose size is a field of its own."""
    config = {
        **_SMALL,
        "vocab_size_per_layer_input": ROWS - 10,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    }
    base = make(tmp_path / "base", "gemma3n_text", "Gemma3nForCausalLM", config)
    refused(base, "vocab_size_per_layer_input")
    with pytest.raises(ModelError, match="vocab_size_per_layer_input"):
        dry_run(base, 100)


def _with(base: Path, out: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(base, out)
    save_file(
        {**load_file(base / "model.safetensors"), **tensors},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


def test_unknown_tensors_with_a_row_a_token_are_refused(family: Base, tmp_path: Path) -> None:
    for number, name in enumerate(("llama", "qwen3-tied", "bert", "mbart")):
        bases = family(name)
        refused(
            _with(bases, tmp_path / f"{number}a", counts=torch.zeros(ROWS)),
            "counts has the vocabulary's size",
        )
        scales = {"model.embed_tokens.weight_scale": torch.zeros(ROWS, 1)}
        refused(_with(bases, tmp_path / f"{number}b", **scales), "weight_scale has the vocabulary's size")


def test_config_and_class_must_fit(family: Base, tmp_path: Path) -> None:
    base = shutil.copytree(family("gpt2"), tmp_path / "base")
    for changes, sentence in (
        ({"architectures": ["BloomForCausalLM"]}, "names BloomForCausalLM and describes a gpt2"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel, which transformers does not know"),
        ({"architectures": ["AutoModel"]}, "AutoModel, which transformers does not know"),
        ({"model_type": "nonsense", "architectures": None}, "does not describe a language model"),
        ({"vocab_size": -4}, "does not describe a language model"),
        ({"n_head": 0}, "does not describe a language model"),
    ):
        config = {**read_config(family("gpt2")), **changes}
        (base / "config.json").write_text(json.dumps(config), "utf-8")
        refused(base, sentence)
    config = read_config(family("gpt2"))
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    assert find_layout(base, shards(base)).num_rows == ROWS


# --- the opener -------------------------------------------------------------------------------------------


def test_the_opener_answers_from_a_child_as_in_this_process(
    bases: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["床前明月光 the firefly", ""]
    with Opener() as here:
        assert here._child is None
        expected = here.encode(bases("bloom"), texts)
    monkeypatch.delitem(sys.modules, "transformers")
    with Opener() as child:
        assert child._child is not None
        assert child.encode(bases("bloom"), texts) == expected
        with pytest.raises(RuntimeError, match="nowhere"):
            child.encode(tmp_path / "nowhere", texts)
        child._child.kill()
        with pytest.raises(RuntimeError, match="has died"):
            child.encode(bases("bloom"), texts)
    assert child._child.returncode is not None
