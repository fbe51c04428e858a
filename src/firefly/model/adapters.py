"""Adapters: small trained updates of a frozen model's linear layers, in peft's layout, and merged into plain weights.

    lora   W x + (alpha / rank) · B A x        Hu et al. 2021, "LoRA"
    dora   the same W + …, each row rescaled to a learned length        Liu et al. 2024, "DoRA"
    qlora  lora over a base whose W is held in 4 bits (NF4)        Dettmers et al. 2023, "QLoRA"

peft makes and merges the layers. Our modules have transformers' names, so what is saved here opens in plain peft on
the plain transformers model, and the other way round. Needs the extra `lora`, or `qlora` for bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firefly.errors import ModelError, ProofError, RecipeError, choices
from firefly.files import directory_atomic, require_disk, write_json
from firefly.model.families import CausalModel, build, transformers_model
from firefly.model.load import (
    fill_parts,
    load_model,
    read_config,
    restore_buffers,
    save_model,
    state_to_save,
    stored_dtype,
)
from firefly.model.packed import PackedInput
from firefly.model.shards import weight_files
from firefly.recipe import Method, TrainSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name in peft's files
_TOLERANCE = 1e-4  # of a merge in float32, relative to the largest logit
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations that alter the base's weights


@dataclass(frozen=True)
class MergeResult:
    """A merged model directory, and how far its logits lie from those of base and adapter, in float32.

    `merge_difference` is what folding the adapter into the weights changed, `rounding_difference` what storing them
    in `dtype` changed (0 for float32); `largest_logit` is what to compare them with.
    """

    output: str
    base: str
    dtype: str
    merged_layers: int
    largest_logit: float
    merge_difference: float
    rounding_difference: float


def require_method(method: Method) -> None:
    """Find out before any long work whether this machine can train with `method`; `RecipeError` names a missing
    package."""
    if method != "full":
        _peft()
    if method == "qlora":
        _bitsandbytes()


def load_for_training(
    directory: Path,
    section: TrainSection,
    device: torch.device,
    bf16: bool = False,
    share: Callable[[CausalModel], None] | None = None,
) -> CausalModel:
    """The model of a directory, ready to train: with adapters on a frozen base unless the method is full.

    The base's linear layers are held in NF4 by qlora, else in bf16 where the products run in it anyway (the same
    numbers, in half the memory). `share` lays a model out among several ranks; it comes from the meta device, and then
    each rank reads its own parts alone. Raises `RecipeError` for an unknown target module.
    """
    if share is not None and section.method in ("full", "lora"):
        config, files = read_config(directory), weight_files(directory)
        model = empty_model(config, section)
        restore_buffers(model, config, device)
        if section.method == "lora":
            _attach_drawn(model, section, directory)
            round_frozen(model, bf16)
        share(model)
        fill_parts(model, files)
        return model
    if section.method == "qlora":
        # By way of main memory, so that the device never holds more than the 4-bit model and one layer.
        model = load_model(directory, "cpu", stored_dtype(directory))
        quantize(transformers_model(model), device, bf16)
    else:
        dtype = torch.float32 if section.weights == "float32" else torch.bfloat16
        model = load_model(directory, device if share is None else "cpu", dtype)
    if section.method != "full":
        attach(model, section, directory)
    if section.method in ("lora", "dora"):
        round_frozen(model, bf16)
    if share is not None:  # after all, as NF4 and DoRA's lengths are made of whole matrices
        share(model)
    return model


def empty_model(config: dict[str, Any], section: TrainSection) -> CausalModel:
    """The base of a config.json on the meta device, in the dtype of the recipe and not that of the file."""
    plain = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    with torch.device("meta"):
        model = build(plain)
    return model if section.weights == "float32" else model.to(torch.bfloat16)


def round_frozen(model: CausalModel, bf16: bool) -> None:
    """Keep linear layers that do not learn in bf16, where the products run in it."""
    for layer in linear_layers(transformers_model(model)).values() if bf16 else ():
        if not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)


def _attach_drawn(model: CausalModel, section: TrainSection, base: Path) -> None:
    """`attach` to a base on the meta device, where peft would put the adapters, too, and their random numbers."""
    layers = list(linear_layers(transformers_model(model)).values())
    weights = [layer.weight for layer in layers]
    for layer in layers:
        layer.weight = nn.Parameter(torch.empty(0))
    attach(model, section, base)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight.requires_grad_(False)


def attach(model: CausalModel, section: TrainSection, base: Path) -> None:
    """Give the linear layers new adapters, which change nothing yet, and freeze everything else.

    Draws from torch's random state. Raises `RecipeError` for an unknown target module.
    """
    peft, inner = _peft(), transformers_model(model)
    config = peft.LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=_targets(inner, section.lora_target_modules),
        use_dora=section.method == "dora",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.absolute()),
    )
    peft.inject_adapter_in_model(config, inner)
    for parameter in inner.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # whatever the base is stored in


def save_adapter(
    model: CausalModel, out: Path, chat_template: str | None = None, stop_ids: Sequence[int] = ()
) -> None:
    """Write the adapter in peft's layout, atomically, with the chat template and stop tokens it was trained with."""
    inner = transformers_model(model)
    state = {
        _PREFIX + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in _peft().get_peft_model_state_dict(inner, save_embedding_layers=False).items()
    }
    config = cast(Any, inner).peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    require_disk(out, sum(tensor.numel() * 4 for tensor in state.values()) + (1 << 20))
    with directory_atomic(out) as place:
        save_file(state, place / WEIGHTS, metadata={"format": "pt"})
        (place / WEIGHTS).chmod(0o644)
        write_json(place / CONFIG, config | {"inference_mode": True})
        if chat_template is not None:
            (place / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if stop_ids:
            write_json(place / "generation_config.json", {"eos_token_id": list(stop_ids)})


def adapter_base(directory: Path) -> str:
    """The base model that an adapter names; raises `ModelError` for what is no adapter or names none."""
    name = _read_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{directory / CONFIG} names no base model; name it with --base.")
    return name


def load_adapter(model: CausalModel, directory: Path) -> None:
    """Put an adapter that peft or `save_adapter` wrote on a model.

    Raises `ModelError` for any but LoRA and DoRA on linear layers below the head, and one that does not fit.
    """
    peft, inner, settings = _peft(), transformers_model(model), _read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{directory} has no {WEIGHTS}; save the adapter again with peft, as safetensors.")
    try:
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); fetch the adapter again.") from error
    linear = linear_layers(inner)
    for name in state:
        layer, _, part = name.partition(".lora_")
        if not part or layer not in linear:
            raise ModelError(
                f"{path}: {name} is no LoRA factor of a linear layer below the head of this model; "
                "only such adapters can be merged."
            )
    if settings.get("peft_type") != "LORA" or str(settings.get("init_lora_weights")).startswith(
        _CHANGES_BASE
    ):
        raise ModelError(
            f"{directory} is a {settings.get('peft_type')} adapter (init_lora_weights = "
            f"{settings.get('init_lora_weights')}); only LoRA and DoRA adapters that leave the base as it is can be "
            "merged."
        )
    settings = {**settings, "init_lora_weights": True, "inference_mode": False}
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), inner)
        fitted = peft.set_peft_model_state_dict(inner, state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{directory} does not fit this base model ({error}); name its own with --base."
        ) from error
    lost = [name for name in fitted.missing_keys if "lora_" in name] + list(fitted.unexpected_keys)
    if lost:
        raise ModelError(f"{directory} does not fit this base model ({lost[0]}); name its own with --base.")


@torch.no_grad()
def fold(model: CausalModel) -> int:
    """Add every adapter to the weights below it and take it out; returns how many layers changed."""
    inner = transformers_model(model)
    layers = [(name, module) for name, module in inner.named_modules() if hasattr(module, "get_delta_weight")]
    for name, module in layers:
        module.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(parent), leaf, module.get_base_layer())
    return len(layers)


def merge_adapter(base: Path, adapter: Path, out: Path) -> MergeResult:
    """Write `base` with `adapter` folded in as a plain model directory, on the CPU and in the base's own dtype.

    The logits of random input are compared three times: with the adapter and merged (float32), merged and rounded to
    the dtype, rounded and read again from `out`; the last two must be equal. A chat template and stop tokens that lie
    beside the adapter go with it; a tied head stays tied. Raises `ModelError` when the two do not fit, `ProofError`
    when the merged model is not the same, and then writes nothing.
    """
    dtype = stored_dtype(base)
    model = load_model(base)
    load_adapter(model, adapter)
    probe = _probe(model)
    before = _logits(model, probe)
    merged_layers = fold(model)
    merged = _logits(model, probe)
    largest, difference = float(before.abs().max()), float((merged - before).abs().max())
    if not difference <= _TOLERANCE * largest:
        raise _not_the_same(
            f"folding the adapter in moved a logit by {difference:.2g} (largest: {largest:.2g})"
        )
    with torch.no_grad():
        for parameter in transformers_model(model).parameters():
            parameter.copy_(parameter.to(dtype))
    rounded = _logits(model, probe)
    template = next(
        (path for place in (adapter, base) if (path := place / "chat_template.jinja").is_file()), None
    )
    stop_ids = _stop_ids(adapter)
    with directory_atomic(out) as place:
        chat_template = template.read_text("utf-8") if template else None
        save_model(state_to_save(model), base, place, chat_template, dtype, stop_ids)
        del model
        if not torch.equal(_logits(load_model(place), probe), rounded):
            raise _not_the_same("what was written does not give the merged logits")
    return MergeResult(
        output=str(out),
        base=str(base),
        dtype=str(dtype).removeprefix("torch."),
        merged_layers=merged_layers,
        largest_logit=largest,
        merge_difference=difference,
        rounding_difference=float((rounded - merged).abs().max()),
    )


def _not_the_same(what: str) -> ProofError:
    error = ProofError(f"The merged model is not base and adapter: {what}; nothing was written.")
    error.what = what
    return error


def _probe(model: CausalModel, lengths: tuple[int, ...] = (1, 7, 32, 64)) -> PackedInput:
    """Documents of random ids, always the same ones."""
    total = sum(lengths)
    ids = torch.randint(len(model.head), (total,), generator=torch.Generator().manual_seed(0))
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(borders)])
    return PackedInput(ids, positions, borders, torch.arange(0), torch.arange(0))


@torch.no_grad()
def _logits(model: CausalModel, probe: PackedInput) -> Tensor:
    """Logits at every position, T V float32."""
    model.eval()
    return model.hidden(probe) @ model.head.T


def _stop_ids(adapter: Path) -> list[int]:
    path = adapter / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return named if isinstance(named, list) else [] if named is None else [int(named)]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(f"{directory} has no {CONFIG}, so it is no adapter; check the path.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} does not hold a JSON object; fetch it again.")
    return settings


def linear_layers(inner: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name, those inside adapters and the head left out."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and name != "lm_head"
    }


def _targets(inner: nn.Module, wanted: list[str]) -> list[str]:
    """The ends of the names of the layers that get adapters: those asked for, or all of them."""
    names = list(linear_layers(inner))
    leaves = sorted({name.rpartition(".")[2] for name in names})
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise RecipeError(
                f"train.lora_target_modules: the model has no linear layer '{target}'; {choices(target, leaves)}."
            )
    return wanted or leaves


def quantize(inner: nn.Module, device: torch.device, bf16: bool) -> None:
    """Move a network to `device`, in place: linear layers below the head in NF4 with their products in bf16 or
    float32, other matrices in that dtype, norms and biases in float32."""
    bitsandbytes, dtype = _bitsandbytes(), torch.bfloat16 if bf16 else torch.float32
    for name, layer in linear_layers(inner).items():
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        # A validation on a CPU would repack the codes for inference, and the next step would get no gradients.
        small.support_avx512bf16_for_cpu = False
        small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        if layer.bias is not None:
            small.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(parent), leaf, small.to(device))  # the move quantizes
    for parameter in inner.parameters():
        if parameter.is_floating_point():  # the 4-bit codes are bytes
            parameter.data = parameter.data.to(device, dtype if parameter.ndim > 1 else torch.float32)
    inner.to(device)  # buffers


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise RecipeError("Adapters need peft; install it with: pip install 'firefly-zh[lora]'.") from error
    return peft


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise RecipeError(
            "train.method = 'qlora' needs bitsandbytes; install it with: pip install 'firefly-zh[qlora]'."
        ) from error
    return bitsandbytes
