"""Each rank reads and holds its own part of a model, and takes the memory that the plan says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from counted import in_processes, recipe_of
from firefly.model.adapters import load_for_training
from firefly.model.families import CausalModel, build, transformers_model
from firefly.model.load import save_model, stored_dtype
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss
from firefly.model.split import part_of, split_embedding
from firefly.recipe import Recipe
from firefly.train.memory import BatchShape
from firefly.train.optim import make_optimizer
from firefly.train.parallel import Parts, Ranks, before_micro_batch, distribute, take_places
from firefly.train.ranks import PREFETCH, Load, rank_memory
from firefly.train.traffic import Layout
from tiny import save_model_dir

CPU = torch.device("cpu")

# --- loading --------------------------------------------------------------------------------------------------------

Case = tuple[
    Path, dict[str, Any], dict[str, Any], bool
]  # model, the tables parallel and train, bf16 products

LAYOUTS: list[dict[str, Any]] = [{"zero": 1}, {"zero": 3}, {"tp": 2}, {"zero": 3, "offload": "all"}]


class _Counting:
    """Stands in for `safe_open`: counts the bytes that are read."""

    num_bytes = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.opened = safe_open(*arguments, **options)

    def __enter__(self) -> _Counting:
        self.real = self.opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_slice(self, name: str) -> Any:
        stored = self.real.get_slice(name)

        class Slice:
            get_shape = stored.get_shape

            def __getitem__(self, where: Any) -> Tensor:
                found: Tensor = stored[where]
                _Counting.num_bytes += found.nbytes
                return found

        return Slice()


class _HighWater(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that were there at once, whoever holds them; FSDP2 empties storages and fills them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.at_most, self.looks = 0, dict[str, int](), True
        self.kinds: dict[str, set[int]] = {}
        self.living: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # so that what happens inside is seen
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.living[leaf.untyped_storage()._cdata] = leaf.untyped_storage()
        sizes = {key: one.nbytes() for key, one in self.living.items()} if self.looks else {}
        if sum(sizes.values()) > self.most:
            self.most = sum(sizes.values())
            self.at_most = {kind: sum(sizes.get(key, 0) for key in keys) for kind, keys in self.kinds.items()}
            self.at_most["rest"] = self.most - sum(self.at_most.values())
        return out

    def begin(self, kinds: dict[str, list[Tensor]]) -> None:
        """From here on another maximum counts, by kinds of tensors and the `rest`."""
        self.most, self.looks = 0, True
        self.kinds = {
            name: {one.untyped_storage()._cdata for one in tensors} for name, tensors in kinds.items()
        }


def load_share(_rank: int, cases: list[Case]) -> None:
    """In each of two processes: what is loaded is the part of the whole, and no more than that was read or held."""
    for folder, parallel, train, bf16 in cases:
        recipe = recipe_of(parallel, train)
        ranks = take_places(recipe, CPU)
        torch.manual_seed(0)
        whole = load_for_training(folder, recipe.train, CPU, bf16)
        torch.manual_seed(0)
        _Counting.num_bytes = 0
        with patch("firefly.model.load.safe_open", _Counting), _HighWater() as memory:
            share = partial(distribute, section=recipe.parallel, ranks=ranks, bf16=bf16)
            model = load_for_training(folder, recipe.train, CPU, bf16, share)
        assert_same(model, whole, ranks)
        case = f"{folder.parent.name}, {parallel}, {train}, {bf16}"
        names = dict(transformers_model(model).named_parameters())
        parts = {name: local(one) for name, one in names.items()}
        of_file = [one.numel() for name, one in parts.items() if ".lora_" not in name]
        assert _Counting.num_bytes == stored_dtype(folder).itemsize * sum(of_file), case
        held = sum(one.nbytes for one in parts.values())
        tensor = max(
            one.numel() * one.element_size() for one in names.values()
        )  # whole, as a file's pages lie
        assert memory.most <= 1.05 * held + tensor, (case, memory.most, held)
        every = sum(one.nbytes for one in transformers_model(whole).parameters())
        if parallel != {"zero": 1} or train != {"method": "lora"}:  # there, a frozen base stays whole
            assert held < 0.56 * every, (case, held, every)


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def assert_same(model: CausalModel, whole: CausalModel, ranks: Ranks) -> None:
    found, expected = (dict(transformers_model(one).named_parameters()) for one in (model, whole))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        together = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert together.dtype == expected[name].dtype and torch.equal(together, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name
    assert (model.head is model.embedding.weight) == (whole.head is whole.embedding.weight)
    for (name, buffer), other in zip(model.named_buffers(), whole.buffers(), strict=True):
        mine = other.chunk(ranks.tp)[ranks.tp_rank] if name == "slopes" else other
        assert torch.equal(buffer, mine), name


def test_a_rank_reads_its_part_and_nothing_else(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Fused and separate projections, tied heads and others, norms of single heads, 503 rows that do not divide."""
    half = save_model_dir(tmp_path / "half" / "model", "qwen3")
    weights = load_file(half / "model.safetensors")
    save_file(
        {name: one.bfloat16() for name, one in weights.items()}, half / "model.safetensors", {"format": "pt"}
    )
    bloom, qwen3, lora = tiny("bloom"), tiny("qwen3"), {"method": "lora"}
    cases: list[Case] = [(bloom, parallel, {}, False) for parallel in LAYOUTS]
    cases += [(tiny(family), one, {}, False) for family in ("qwen3", "llama") for one in LAYOUTS[1:3]]
    cases += [(tiny("gemma3_text"), {"zero": 3}, {}, False)]
    cases += [(folder, one, lora, False) for folder in (bloom, qwen3) for one in LAYOUTS[1:3]]
    cases += [(bloom, LAYOUTS[3], lora, False), (qwen3, {"zero": 1}, lora, False)]
    cases += [(half, {"zero": 3}, options, True) for options in ({}, lora, {"weights": "bf16_stochastic"})]
    in_processes(load_share, 2, cases)


def test_the_finished_model_is_converted_one_file_at_a_time(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1 << 20
    monkeypatch.setattr("firefly.model.load._SHARD_BYTES", mib)
    state = {f"matrix.{number}": torch.ones(256, 1024) for number in range(8)}
    with _HighWater() as memory:
        save_model(state, tiny("bloom"), tmp_path / "out", None, torch.bfloat16)
    assert memory.most == mib and len(list((tmp_path / "out").glob("*.safetensors"))) == 4


# --- gradients of adapters ------------------------------------------------------------------------------------------


def adapters_gradients(folder: Path, parallel: dict[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Whole gradients, when no adapter is as it begins: B is zero then, and hides what A passes on."""
    recipe = recipe_of(parallel, {"method": "lora"})
    share = partial(distribute, section=recipe.parallel, ranks=ranks, bf16=False) if parallel else None
    model = load_for_training(folder, recipe.train, CPU, False, share)
    names = {name: one for name, one in transformers_model(model).named_parameters() if one.requires_grad}
    parts, random = Parts(names, ranks), torch.Generator().manual_seed(1)
    for name, parameter in names.items():
        parts.put(name, parts.cut(name, torch.randn(parameter.shape, generator=random) * 0.1))
    ids = torch.arange(24) * 7 % 500
    batch = PackedInput(ids, torch.arange(24) % 12, [0, 12, 24], torch.arange(1, 20), ids[2:21])
    torch.autograd.backward(batch_loss(model, batch)[0])
    parts.take_gradients()
    return {name: parts.gather(name, part.grad) for name, part in parts.here.items() if part.grad is not None}


def learn_alike(_rank: int, folders: list[Path]) -> None:
    ranks = take_places(recipe_of({"tp": 2}, {}), CPU)
    for folder in folders:
        alone = adapters_gradients(folder, {}, Ranks(CPU))
        split = adapters_gradients(folder, {"tp": 2}, ranks)
        assert split.keys() == alone.keys()
        for name, gradient in split.items():
            torch.testing.assert_close(
                gradient, alone[name], rtol=1e-4, atol=1e-5 * float(alone[name].abs().max())
            )


def test_adapters_under_tensor_parallelism_get_the_same_gradients(tiny: Callable[[str], Path]) -> None:
    in_processes(learn_alike, 2, [tiny("bloom"), tiny("qwen3")])


# --- the embedding under tensor parallelism ---------------------------------------------------------------------------


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # so that what happens inside is seen
        out = func(*args, **(kwargs or {}))
        self.seen.update(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def embed_alike(_rank: int) -> None:
    mesh, ids = init_device_mesh("cpu", (2,)), torch.tensor([[0, 7, 10, 5, 6, 7, 3, 0]])
    torch.manual_seed(0)
    kinds = [nn.Embedding(11, 4), nn.Embedding(11, 4, padding_idx=7), nn.Embedding(11, 4, padding_idx=2)]
    for made in [*kinds, Gemma3TextScaledWordEmbedding(11, 4, 7, embed_scale=3.0)]:
        whole, pull = deepcopy(made), torch.randn(1, 8, 4)
        split_embedding(made, mesh)
        with _Shapes() as shapes:
            states = made(ids)
            (states * pull).sum().backward()
        alone = whole(ids)
        (alone * pull).sum().backward()
        assert torch.equal(states, alone)
        assert isinstance(made.weight.grad, DTensor) and whole.weight.grad is not None
        assert made.weight.grad.placements == (Shard(0),)
        assert torch.equal(made.weight.grad.full_tensor(), whole.weight.grad)
        assert (11, 4) not in shapes.seen, "the whole matrix, or its gradient, was there"


def test_a_split_embedding_is_the_whole_one_and_no_rank_has_all_its_gradient() -> None:
    """Eleven rows do not divide, one may be a padding row, and Gemma's are scaled."""
    in_processes(embed_alike, 2)


# --- where a part lies ----------------------------------------------------------------------------------------------

UNEVEN = [(9, 4), (5, 2), (46, 4), (16, 8), (3, 2)]
"""Rows and columns. Of 9 rows, `distribute_tensor` gives the ranks of dp 4 and tp 2 others than FSDP does."""


def laid_out(rows: int, columns: int, ranks: Ranks) -> tuple[nn.Module, Tensor]:
    """Two matrices that count up, split by rows and by columns, then sharded; and the whole."""
    assert ranks.mesh is not None
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(columns, rows, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(whole.clone())
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, ranks.mesh["tp"], plan, src_data_rank=None)
    fully_shard(model, mesh=ranks.mesh["shard"])
    return model, whole


def in_eight(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1, 4, 2), mesh_dim_names=("replicate", "shard", "tp"))
    ranks = Ranks(CPU, rank, 8, 2, mesh)
    for shape in UNEVEN:
        model, whole = laid_out(*shape, ranks)
        parts = Parts(dict(model.named_parameters()), ranks)
        for name, part in parts.local.items():
            assert torch.equal(part, parts.cut(name, whole)), (shape, name)
            assert torch.equal(parts.gather(name, part.detach()), whole), (shape, name)


@pytest.mark.nightly  # eight processes take long to start
def test_what_does_not_divide_is_cut_and_put_together_rightly() -> None:
    in_processes(in_eight, 8)


def as_the_last_of_eight(_rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
    mesh = init_device_mesh("cpu", (1, 4, 2), mesh_dim_names=("replicate", "shard", "tp"))
    for shape in UNEVEN:
        model, whole = laid_out(*shape, Ranks(CPU, 7, 8, 2, mesh))
        for parameter in model.parameters():
            if not torch.equal(local(parameter), whole[part_of(parameter)]):
                raise AssertionError(shape)


def test_a_part_lies_where_torch_has_put_it() -> None:
    """Under tensor parallelism and FSDP at once; of eight processes the others are not there."""
    torch.multiprocessing.spawn(as_the_last_of_eight)


# --- memory ---------------------------------------------------------------------------------------------------------

SHAPE = {"model_type": "bloom", "vocab_size": 1024, "hidden_size": 128, "n_layer": 8, "n_head": 8}
TOKENS, ACCUMULATION = 8, 2


def measure(recipe: Recipe) -> dict[str, int]:
    """Bytes at the moment of the second of two steps when there are most: of weights, of the optimizer, of the rest."""
    ranks = take_places(recipe, CPU)
    ids = torch.arange(TOKENS)
    batch = PackedInput(ids, ids, [0, TOKENS], ids[:-1], ids[1:])
    with _HighWater() as memory:
        memory.looks = False  # not yet
        model = build(SHAPE)
        distribute(model, recipe.parallel, ranks, bf16=False)
        parts = Parts(dict(transformers_model(model).named_parameters()), ranks)
        optimizer = make_optimizer(parts.local.values(), recipe.train)
        for step in range(2):
            if step == 1:
                gc.collect()
                memory.begin({"weights": gathered(model), "optimizer": states_of(optimizer)})
            for micro in range(ACCUMULATION):
                before_micro_batch(model, recipe.parallel, last=micro == ACCUMULATION - 1)
                torch.autograd.backward(batch_loss(model, batch)[0])
            parts.take_gradients()
            parts.clip(1.0)
            parts.step(optimizer)
            parts.zero_grad()
    return memory.at_most


def gathered(model: CausalModel) -> list[Tensor]:
    """The memory of all parameters: this rank's parts, and what FSDP2 fills with whole ones and empties again."""
    groups = [
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    whole = [one._unsharded_param for group in groups for one in group.fsdp_params]
    return [local(one.detach()) for one in (*model.parameters(), *whole)]


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def hold_share(_rank: int, layouts: list[dict[str, Any]]) -> None:
    options, shape = {"gradient_accumulation_steps": ACCUMULATION}, BatchShape(TOKENS, TOKENS, TOKENS - 1)
    load = Load(SHAPE, recipe_of({}, options).train, shape, None, bf16=False, device_kind="cpu")
    for parallel in layouts:
        recipe = recipe_of(parallel, options)
        planned, _ = rank_memory(load, Layout.of(recipe.parallel, 2, load.num_heads), ACCUMULATION)
        # A layer that is gathered ahead of its turn is a weight in the plan, but in no parameter yet.
        ahead = 4 * sum(map(prod, load.units.layer)) * PREFETCH if parallel.get("zero") == 3 else 0
        expected = {"weights": planned.weights - ahead, "optimizer": planned.optimizer}
        expected["rest"] = planned.tensors - planned.weights - planned.optimizer + ahead
        found = measure(recipe)
        assert found == {name: pytest.approx(size, rel=0.1) for name, size in expected.items()}, parallel


def test_a_rank_takes_the_memory_that_the_plan_says() -> None:
    in_processes(hold_share, 2, [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"tp": 2}])
