"""The last part of the proof: plain transformers computes the original's logits on K.

A model that fits in memory is opened by `from_pretrained`, the original first, then the pruned one. A larger
one is streamed: its modules are built with parameters on the meta device, and each gets its weights from the
files for the moment of its own forward pass. Both ways run both directories from their own config and files,
so they would show a wrong tie, a stale id or a tensor under a wrong name, which equal bytes alone do not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.errors import ModelError
from firefly.model.hub import quiet_transformers
from firefly.prune.layout import (
    inspect_architecture,
    load_config,
    match,
    model_class,
)
from firefly.prune.proof_weights import failed
from firefly.prune.weights import read_header, shards

_ROWS, _TOKENS = 4, 32
_HEADROOM = 1.25  # activations, and the tensor that is being converted
_SKIP = "leave this part of the proof out with --skip-logits-proof if you must"


def prove_logits(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], streamed: bool | None = None
) -> dict[str, Any]:
    """On random in-K inputs, plain transformers in float32 gives the original's logits on K.

    Either bit for bit, or no further from the original in float64 than twice the original's own float32
    error (a matrix of another width may be multiplied in another order). A model without a head is judged
    by its last hidden states.

    Args:
        streamed: one module at a time (memory: the largest module, in float32) instead of one model at a
            time (four bytes a parameter); None: when the model would not fit into the free memory.
    """
    import torch

    if streamed is None:
        params = sum(math.prod(one.shape) for path in shards(base) for one in read_header(path)[0].values())
        streamed = params * 4 * _HEADROOM > _available_bytes()
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, len(new_to_old), size=(_ROWS, _TOKENS))
    keep = torch.from_numpy(new_to_old)

    def run(directory: Path, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        original = directory == base
        ids = new_to_old[inputs] if original else inputs
        try:
            with quiet_transformers():
                model = (
                    _streamed(directory, dtype, new_to_old if original else None)
                    if streamed
                    else _loaded(directory, dtype)
                )
            outputs, has_head = _forward(model, torch.from_numpy(ids))
        except (RuntimeError, ValueError, OSError, NotImplementedError, ImportError, KeyError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{directory} does not run in transformers: {error}; {_SKIP}.") from error
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        return (outputs[..., keep] if original and has_head else outputs), tied

    before, was_tied = run(base, torch.float32)
    after, is_tied = run(pruned, torch.float32)
    if was_tied != is_tied or before.shape != after.shape:
        raise failed("the pruned model's output embeddings are not built as the original's")
    way = " (streamed)" if streamed else ""
    if torch.equal(before, after):
        return {"logits": f"bit-equal{way}", "logits_max_difference": 0.0}
    exact = run(base, torch.float64)[0]
    own_error = float((before.double() - exact).abs().max())
    error = float((after.double() - exact).abs().max())
    if not error <= 2 * own_error:
        raise failed(f"logits differ by {error:.3g} where float32 itself errs by {own_error:.3g}")
    return {
        "logits": f"within float32 error{way}",
        "logits_max_difference": float((before - after).abs().max()),
    }


def _available_bytes() -> float:
    """Memory that is free for us; unknown counts as plenty."""
    info = Path("/proc/meminfo")
    for line in info.read_text("utf-8").splitlines() if info.is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _forward(model: Any, ids: Any) -> tuple[Any, bool]:
    """Logits (or last hidden states) for `ids` [rows, tokens], and whether they are logits."""
    import torch

    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    limit = min((limit - 4 for limit in limits if limit), default=_TOKENS)  # some begin behind the padding's
    ids = ids[:, : max(1, limit)]
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=ids, **arguments)
    return (result.logits, True) if hasattr(result, "logits") else (result[0], False)


def _loaded(directory: Path, dtype: Any) -> Any:
    cls = model_class(load_config(directory))
    return cls.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


def _streamed(directory: Path, dtype: Any, rows: NDArray[np.int64] | None) -> Any:
    """The model of `directory`, each module of which reads its parameters when it runs and drops them after.

    `rows`: the rows that the vocabulary's tensors need; the others stay zero and take no memory.
    """
    import torch
    from safetensors import safe_open

    architecture = inspect_architecture(directory)
    with parameters_on_meta(dtype):
        config = load_config(directory)
        model = model_class(config)(config).eval()
    where = {name: path for path in shards(directory) for name in read_header(path)[0]}
    tensors = [tensor for path in shards(directory) for tensor in read_header(path)[0].values()]
    source = {name: tensor.name for name, tensor in match(directory, architecture, tensors).items()}

    def read(name: str) -> Any:
        stored = source[name]
        with safe_open(str(where[stored]), framework="pt") as file:
            tensor = file.get_tensor(stored)
            if rows is None or name not in architecture.vocabulary:
                return tensor.to(dtype)
            full = torch.from_numpy(np.zeros(tensor.shape, dtype=str(dtype).removeprefix("torch.")))
            num_rows = architecture.layout.num_rows
            full.view(num_rows, -1)[rows] = tensor.view(num_rows, -1)[rows].to(dtype)
            return full

    state = model.state_dict(keep_vars=True)
    shared: dict[int, str] = {}
    for name, tensor in state.items():
        if name in source:
            shared.setdefault(id(tensor), name)  # the embeddings come first, and others are tied to them
    for name, tensor in state.items():
        if tensor.is_meta and id(tensor) not in shared:
            raise ModelError(
                f"{directory}: the weights of {name} are stored in another form than {architecture.name} uses, and "
                f"the model is too large to be opened whole; {_SKIP}."
            )
        if not tensor.is_meta and name in source:  # a buffer
            tensor.copy_(read(name))

    for place, module in model.named_modules():
        named: dict[str, str] = {}
        for key, tensor in module._parameters.items():
            if tensor is not None:  # a tied one may be stored under this name too, or under another alone
                own = f"{place}.{key}" if place else key
                named[key] = own if own in source else shared[id(tensor)]
        if not named:
            continue
        empty = dict(module._parameters)

        def load(module: Any, _: Any, named: dict[str, str] = named) -> None:
            for key, name in named.items():
                module._parameters[key] = torch.nn.Parameter(read(name), requires_grad=False)

        def drop(module: Any, _: Any, __: Any, empty: dict[str, Any] = empty) -> None:
            module._parameters.update(empty)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop, always_call=True)
    return model


@contextlib.contextmanager
def parameters_on_meta(dtype: Any) -> Iterator[None]:
    """Modules built inside keep their parameters without memory; buffers, which are computed, are real."""
    import torch

    register, default = torch.nn.Module.register_parameter, torch.get_default_dtype()

    def on_meta(self: Any, name: str, param: Any) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    torch.set_default_dtype(dtype)
    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
