"""Where a model keeps its vocabulary, and what pruning makes of its size.

The architecture itself is asked: built twice on the meta device, with two vocabulary sizes, it shows which
tensors follow the vocabulary. They must be the input embeddings, the output embeddings and their biases;
an architecture with other per-token state is refused. Importing transformers and torch for that takes
seconds and a third of a GB, so the plainest families, whose files show it all, are told by `_PLAIN`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firefly.errors import ModelError, RecipeError
from firefly.model.hub import quiet_transformers
from firefly.model.shards import INDEX, SINGLE
from firefly.prune.weights import Tensor, blocks, read_header, shards

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
# model_type → input embeddings as the files call them, and whether the head is tied to them by default. A test
# holds every row against the architecture's own account.
_PLAIN = {
    "bloom": ("word_embeddings.weight", True),
    "gemma": (_EMBEDDING, True),
    "gemma2": (_EMBEDDING, True),
    "gemma3_text": (_EMBEDDING, True),
    "llama": (_EMBEDDING, False),
    "mistral": (_EMBEDDING, False),
    "qwen2": (_EMBEDDING, False),
    "qwen3": (_EMBEDDING, False),
}
_VOCABULARY_FIELDS = {"vocab_size", "type_vocab_size"}  # the second counts BERT's segment types
_BUFFER = ".inv_freq"  # older Llama files hold it; it is no parameter
_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True)
class Layout:
    """How a model depends on its vocabulary."""

    names: frozenset[str]  # tensors with one row a token, in the checkpoint's spelling
    num_rows: int
    params: int  # tied matrices counted once
    params_per_row: int  # likewise
    head_params_per_row: int  # of a head that is tied to the input embeddings, else 0

    def params_with(self, num_rows: int) -> int:
        """Parameters once the vocabulary has `num_rows` rows."""
        return self.params - (self.num_rows - num_rows) * self.params_per_row

    def untied(self, matrix: Tensor | None = None) -> Layout:
        """The same with one more matrix: a head, or a copy of `matrix`, that is stored by itself."""
        width = math.prod(matrix.shape) // self.num_rows if matrix else self.head_params_per_row
        return replace(
            self,
            params=self.params + self.num_rows * width,
            params_per_row=self.params_per_row + width,
            head_params_per_row=0,
        )


def find_layout(base: Path, files: list[Path]) -> Layout:
    """The vocabulary layout of the model directory `base` with the weight files `files`.

    Raises `ModelError` for an unknown architecture, one with per-token state beyond embeddings, head and
    biases, and weights that do not fit config.json: better no model than one pruned by half.
    """
    where = {name: path for path in files for name in read_header(path)[0]}
    tensors = [tensor for path in files for tensor in read_header(path)[0].values()]
    layout, groups = plain_layout(read_config(base), tensors) or inspected_layout(base, tensors)
    # A file may hold a tied matrix twice; transformers keeps the two apart when they differ (mT5's do).
    for first, *others in groups:
        for other in others:
            if not _same_bytes(where, first, other):
                layout = layout.untied(first)
    return layout


def _same_bytes(where: dict[str, Path], one: Tensor, two: Tensor) -> bool:
    with where[one.name].open("rb", buffering=0) as left, where[two.name].open("rb", buffering=0) as right:
        pairs = zip(
            blocks(left, iter([(one.start, one.end)])),
            blocks(right, iter([(two.start, two.end)])),
            strict=True,
        )
        return one.num_bytes == two.num_bytes and all(bytes(a) == bytes(b) for a, b in pairs)


def read_config(base: Path) -> dict[str, Any]:
    """The parsed config.json; raises `ModelError`."""
    path = base / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{base} has no config.json; give a model directory in Hugging Face layout."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a JSON {type(config).__name__}, not an object; fetch the file again.")
    return config


Groups = list[list[Tensor]]  # stored tensors that the architecture ties to each other


def plain_layout(config: dict[str, Any], tensors: list[Tensor]) -> tuple[Layout, Groups] | None:
    """The layout of a family in `_PLAIN` whose files hold nothing unusual; None: ask the architecture."""
    embedding, tied = _PLAIN.get(str(config.get("model_type")), ("", False))
    rows = config.get("vocab_size")
    names = config.get("architectures") or ["ForCausalLM"]
    if not (embedding and isinstance(rows, int) and str(names[0]).endswith("ForCausalLM")):
        return None
    tied = config.get("tie_word_embeddings", tied)
    found = [tensor for tensor in tensors if rows in tensor.shape]
    kinds = [next((kind for kind in (embedding, _HEAD) if _ends(one.name, kind)), "") for one in found]
    shapes = {tensor.shape for tensor in found}
    expected = [{embedding}, {embedding, _HEAD}] if tied else [{embedding, _HEAD}]
    if len(set(kinds)) < len(kinds) or set(kinds) not in expected or len(shapes) != 1:
        return None
    (shape,) = shapes
    if len(shape) != 2 or shape[0] != rows or shape[1] == rows or _other_vocabularies(config):
        return None
    params = sum(math.prod(tensor.shape) for tensor in tensors if not tensor.name.endswith(_BUFFER))
    num_matrices = 1 if tied else 2
    layout = Layout(
        frozenset(tensor.name for tensor in found),
        rows,
        params - (len(found) - num_matrices) * math.prod(shape),
        num_matrices * shape[1],
        shape[1] if tied else 0,
    )
    return layout, [found] if tied else [[one] for one in found]


def _ends(name: str, tail: str) -> bool:
    return name == tail or name.endswith(f".{tail}")


def _other_vocabularies(config: dict[str, Any]) -> list[str]:
    """Fields that size a second vocabulary, such as Gemma 3n's `vocab_size_per_layer_input`."""
    parts = [
        config,
        *(value for key, value in config.items() if key == "text_config" and isinstance(value, dict)),
    ]
    found = {
        key
        for part in parts
        for key, value in part.items()
        if "vocab_size" in key and key not in _VOCABULARY_FIELDS and isinstance(value, int) and value
    }
    return sorted(found)


@dataclass(frozen=True)
class Architecture:
    """What the meta device tells of a configuration."""

    name: str  # the model class
    prefix: str  # of the base model, which checkpoints may lack
    shapes: dict[str, tuple[int, ...]]  # every tensor of the state
    vocabulary: dict[str, int]  # tensors that follow the vocabulary → group; tied ones share a group
    tied: bool
    layout: Layout


def inspect_architecture(base: Path) -> Architecture:
    """Build the architecture of `base`/config.json on the meta device and see what follows the vocabulary."""
    model = meta_model(base)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    name, rows = type(model).__name__, int(inputs.weight.shape[0])
    before = model.state_dict(keep_vars=True)
    after = meta_model(base, rows + 64).state_dict()
    changed = {key for key, tensor in before.items() if tensor.shape != after[key].shape}

    # The embeddings (an encoder's and a decoder's may be two), the head, and one number a token: biases.
    known = [inputs.weight, *([outputs.weight] if outputs is not None else [])]
    for side in ("get_encoder", "get_decoder"):
        part = getattr(model, side)() if model.config.is_encoder_decoder else None
        known += [part.get_input_embeddings().weight] if part is not None else []
    expected = {
        key
        for key, tensor in before.items()
        if any(tensor is one for one in known)
        or (key in changed and tensor.numel() == rows and "bias" in key)
    }
    others = _other_vocabularies(model.config.to_dict())
    if strange := sorted(changed ^ expected) or others:
        raise ModelError(
            f"{base}: {name} keeps something per token beside its embeddings and head ({strange[0]}), which pruning "
            "would leave behind; pruning this architecture is not supported, so nothing was done."
        )
    distinct = {id(before[key]): before[key] for key in sorted(expected)}
    groups = {address: number for number, address in enumerate(distinct)}
    parameters = {id(parameter) for parameter in model.parameters()}
    tied = outputs is not None and outputs.weight is inputs.weight
    return Architecture(
        name=name,
        prefix=model.base_model_prefix,
        shapes={key: tuple(tensor.shape) for key, tensor in before.items()},
        vocabulary={key: groups[id(before[key])] for key in expected},
        tied=tied,
        layout=Layout(
            frozenset(),
            rows,
            sum(parameter.numel() for parameter in model.parameters()),
            sum(tensor.numel() // rows for key, tensor in distinct.items() if key in parameters),
            inputs.weight.shape[1] if tied else 0,
        ),
    )


def inspected_layout(base: Path, tensors: list[Tensor]) -> tuple[Layout, Groups]:
    """The layout that the architecture on the meta device gives to the checkpoint's `tensors`."""
    model = inspect_architecture(base)
    found = match(base, model, tensors)
    groups: dict[int, list[Tensor]] = {}
    for name, group in model.vocabulary.items():
        if name in found:
            groups.setdefault(group, []).append(found[name])
    names = frozenset(tensor.name for group in groups.values() for tensor in group)
    return replace(model.layout, names=names), list(groups.values())


def match(base: Path, model: Architecture, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Names in the model → the checkpoint's tensors, checked as far as the vocabulary is concerned.

    Checkpoints may lack or have the base model's prefix. Transformers renames more than that while loading
    (prefixes of vision-language models, GPT-NeoX's `embed_out`); a matrix that then is unknown but of the
    vocabulary's shape is told by its last two parts, or by being the only one where only one is wanted.
    """
    rows = model.layout.num_rows
    found: dict[str, Tensor] = {}
    unknown: list[Tensor] = []
    for tensor in tensors:
        candidates = (
            tensor.name,
            f"{model.prefix}.{tensor.name}",
            tensor.name.removeprefix(f"{model.prefix}."),
        )
        name = next((one for one in candidates if one in model.shapes), None)
        if name is None and rows in tensor.shape:
            unknown.append(tensor)
        elif name is not None:
            if name in model.vocabulary:
                _claim(base, model, found, name, tensor)
            found[name] = tensor
    for tensor in unknown:
        # One entry is enough for tied tensors; biases may be absent and start at zero.
        present = {model.vocabulary[name] for name in found if name in model.vocabulary}
        lacking = [name for name, group in model.vocabulary.items() if group not in present]
        tails = [name for name in lacking if name.split(".")[-2:] == tensor.name.split(".")[-2:]]
        shaped = [name for name in lacking if model.shapes[name] == tensor.shape and len(unknown) == 1]
        name = next((names[0] for names in (tails, shaped) if len(names) == 1), None)
        if name is None:
            raise ModelError(
                f"{base}: {tensor.name} has the vocabulary's size ({rows:,}) in its shape {list(tensor.shape)} and "
                f"is unknown to {model.name}; pruning would leave it behind, so nothing was done."
            )
        _claim(base, model, found, name, tensor)
        found[name] = tensor
    present = {model.vocabulary[name] for name in found if name in model.vocabulary}
    for name, group in sorted(model.vocabulary.items()):
        if group not in present and "bias" not in name:
            raise ModelError(f"{base} has no weights for {name}; fetch the model again.")
    return found


def _claim(base: Path, model: Architecture, found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` alone can be the model's `name`."""
    if tensor.shape != model.shapes[name]:
        raise ModelError(
            f"{base}: {tensor.name} has the shape {list(tensor.shape)}, and config.json asks for "
            f"{list(model.shapes[name])}; the two do not belong together."
        )
    if name in found:
        raise ModelError(
            f"{base}: {found[name].name} and {tensor.name} both look like {name} of {model.name}; pruning this "
            "checkpoint is not supported, so nothing was done."
        )


def meta_model(base: Path, num_rows: int | None = None) -> Any:
    """The model that `base`/config.json describes, without memory behind it; `num_rows` changes its vocabulary."""
    import torch

    try:
        with quiet_transformers(), torch.device("meta"):
            config = load_config(base)
            if num_rows is not None:
                config.get_text_config().vocab_size = num_rows
                if hasattr(config, "vocab_size"):
                    config.vocab_size = num_rows
            return model_class(config)(config)
    except ModelError:
        raise
    except Exception as error:  # a config may be wrong in any way
        raise ModelError(_unknown(base, str(error))) from error


def load_config(base: Path) -> Any:
    """The transformers configuration of `base`; raises `ModelError`."""
    from transformers import AutoConfig

    read_config(base)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config may be wrong in any way
        raise ModelError(_unknown(base, str(error))) from error


def _unknown(base: Path, why: str) -> str:
    return f"{base / 'config.json'} does not describe a language model that transformers knows: {why}"


def model_class(config: Any) -> Any:
    """The transformers class that the configuration names in `architectures`, else its language model."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or []:
        named: Any = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            if isinstance(config, named.config_class):  # type: ignore[attr-defined]
                return named
            raise ModelError(f"config.json names {name} and describes a {config.model_type}; fetch it again.")
        raise ModelError(f"config.json names the architecture {name}, which transformers does not know.")
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        mapping = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return mapping[type(config)]


# --- looking before leaping ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeTable:
    """What a vocabulary of `vocab_after` would make of a model; percentages are of `params_before`."""

    model: str
    vocab_before: int  # embedding rows
    vocab_after: int
    params_before: int  # tied matrices counted once
    params_after: int
    percent: float
    bytes_before: int  # of the weight files, or what config.json's dtype gives
    bytes_after: int
    llmpruner_params_after: (
        int  # LLMPruner unties the head when it saves, and so counts it beside the embeddings
    )
    llmpruner_percent: float
    coverage: float | None = None  # share of a corpus' tokens that would be kept, where one was counted
    coverage_sizes: dict[str, int] | None = None  # the vocabulary sizes that cover 99 %, …, 100 % of it


def dry_run(base: Path, vocab_size: int, pad_to_multiple: int = 1) -> SizeTable:
    """Sizes before and after pruning `base` to `vocab_size` rows, from config.json (and headers where they are).

    Raises `ModelError` for what pruning would refuse too, `RecipeError` for a size that is no pruning.
    """
    num_rows = -(-vocab_size // pad_to_multiple) * pad_to_multiple
    config = read_config(base)
    bytes_before = bytes_after = 0
    if any((base / name).is_file() for name in (INDEX, SINGLE)):
        files = shards(base)
        layout = find_layout(base, files)
        for tensor in (one for path in files for one in read_header(path)[0].values()):
            bytes_before += tensor.num_bytes
            kept = tensor.with_rows(num_rows) if tensor.name in layout.names else tensor
            bytes_after += kept.num_bytes
    else:
        layout = inspect_architecture(base).layout
        if config.get("tie_word_embeddings") is False and layout.head_params_per_row:
            layout = layout.untied()  # transformers builds T5 tied and lets the weights decide
        text = config.get("text_config") or config
        named = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
        width = _DTYPE_BYTES.get(str(next((name for name in named if name), "float32")), 4)
        bytes_before, bytes_after = layout.params * width, layout.params_with(num_rows) * width
    if not 0 < num_rows <= layout.num_rows:
        raise RecipeError(
            f"prune.vocab_size = {vocab_size:,}: the model has {layout.num_rows:,} rows; choose at most that many."
        )
    after = layout.params_with(num_rows)
    untied = after + num_rows * layout.head_params_per_row
    return SizeTable(
        model=str(base),
        vocab_before=layout.num_rows,
        vocab_after=num_rows,
        params_before=layout.params,
        params_after=after,
        percent=round(100 * after / layout.params, 2),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        llmpruner_params_after=untied,
        llmpruner_percent=round(100 * untied / layout.params, 2),
    )
