"""However the work is shared among processes, and wherever tensors lie, the training is the same.

A training in one process is compared with trainings of the same samples under every layout. All layouts of one number
of processes run in one start of torchrun (ranks.py), as importing takes longer than training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crew import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from firefly import api
from firefly.data.tokens import Tokens
from firefly.errors import RecipeError
from firefly.model.families import build
from firefly.model.load import load_model, read_config
from firefly.model.loss import linear_cross_entropy
from firefly.model.packed import PackedInput
from firefly.model.split import require_divisible
from firefly.recipe import Recipe
from firefly.train.loop import train
from firefly.train.objectives import training_stream
from firefly.train.parallel import Ranks
from tiny import recipe_table, write_pairs, write_preferences

BATCH, ACCUMULATION, STEPS = 2, 4, 20  # a step of one process: 8 samples

# name: processes with samples of their own, the parallel section, other options of training
TWO: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "zero-0": (2, {"zero": 0}, {}),
    "zero-1": (2, {"zero": 1}, {}),
    "zero-2": (2, {"zero": 2}, {}),
    "zero-3": (2, {"zero": 3}, {}),
    "tp": (1, {"tp": 2}, {}),
    "offload-optimizer": (2, {"zero": 2, "offload": "optimizer"}, {}),
    "offload-all": (2, {"zero": 3, "offload": "all"}, {"gradient_checkpointing": 1}),
    "lora-zero-2": (2, {"zero": 2}, {"method": "lora"}),
    "lora-zero-3": (2, {"zero": 3}, {"method": "lora"}),
    "lora-tp": (1, {"tp": 2}, {"method": "lora"}),
    "dora-zero-3": (2, {"zero": 3}, {"method": "dora"}),
    "qlora-zero-2": (2, {"zero": 2}, {"method": "qlora"}),
    "dpo-zero-3": (2, {"zero": 3}, {"objective": "dpo"}),
}
OF_QWEN3 = ["zero-0", "zero-3", "tp", "lora-tp"]
FOUR: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "four-zero-1": (4, {"zero": 1}, {}),
    "four-zero-3": (4, {"zero": 3}, {}),
    "four-hsdp": (4, {"zero": 2, "hsdp": 2}, {}),
    "four-zero-0-tp": (2, {"zero": 0, "tp": 2}, {}),
    "four-zero-3-tp": (2, {"zero": 3, "tp": 2}, {}),
    "four-offload-all-tp": (2, {"zero": 3, "tp": 2, "offload": "all"}, {}),
    "four-lora-zero-3-tp": (2, {"zero": 3, "tp": 2}, {"method": "lora"}),
}
COMPILED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "compiled-zero-1": (2, {"zero": 1}, {"compile": True}),
    "compiled-zero-3": (2, {"zero": 3}, {"compile": True, "gradient_checkpointing": 1}),
    "compiled-lora-zero-3": (2, {"zero": 3}, {"compile": True, "method": "lora"}),
}
REFUSED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp-three": (1, {"tp": 3}, {}),
    "hsdp-zero-0": (2, {"hsdp": 2}, {}),
    "compact": (2, {"zero": 0}, {"optimizer": "adamw_8bit"}),
    "dora": (1, {"tp": 2}, {"method": "dora"}),
    "compiled-tp": (1, {"tp": 2}, {"compile": True}),
    "qlora-tp": (1, {"tp": 2}, {"method": "qlora"}),
    "qlora-zero-3": (2, {"zero": 3}, {"method": "qlora"}),
    "qlora-offload": (2, {"offload": "all"}, {"method": "qlora"}),
}


class Trainings:
    """Trainings of one family on prepared tokens, by name."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        folder.mkdir()
        for name, write in (("sft", write_pairs), ("dpo", write_preferences)):
            source = write(folder / f"{name}.jsonl")
            prepared = Recipe.from_table(recipe_table(folder / f"{name}-prepared", base, source))
            api.data(prepared)
            (folder / f"{name}-prepared" / "tokens").rename(folder / f"{name}-tokens")

    def recipe(self, name: str, dp: int, parallel: dict[str, Any], options: dict[str, Any]) -> Recipe:
        # A key's bias has no gradient but rounding errors; a larger epsilon keeps AdamW from making steps of them.
        table = recipe_table(
            self.folder / name,
            self.base,
            self.folder / "sft.jsonl",
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION // dp,
            max_steps=STEPS,
            save_steps=STEPS,
            adam_epsilon=1e-5,
            report_to=[],
            **options,
        )
        return Recipe.from_table(table | {"parallel": parallel})

    def tokens(self, recipe: Recipe) -> Path:
        return self.folder / ("dpo-tokens" if recipe.train.objective == "dpo" else "sft-tokens")

    def write(self, name: str, *options: Any) -> list[str]:
        path = self.folder / f"{name}.toml"
        recipe = self.recipe(name, *options)
        path.write_text(recipe.to_toml(), encoding="utf-8")
        return [str(path), str(self.tokens(recipe))]

    def alone(self, name: str, parallel: dict[str, Any], options: dict[str, Any]) -> Path:
        """Train in this process, unless it was done; returns the output directory."""
        recipe = self.recipe(name, 1, parallel, options)
        if not (recipe.out / "model").exists():
            train(recipe, self.base, self.tokens(recipe), recipe.out / "run", recipe.out / "model")
        return recipe.out


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> dict[str, Trainings]:
    folder = tmp_path_factory.mktemp("parallel")
    return {family: Trainings(folder / family, tiny(family)) for family in ("bloom", "qwen3")}


@pytest.fixture(scope="module")
def two_processes(trainings: dict[str, Trainings]) -> dict[str, Trainings]:
    """Every training of two processes, done."""
    bloom, qwen3 = trainings["bloom"], trainings["qwen3"]
    arguments = [text for name, how in (TWO | REFUSED).items() for text in bloom.write(name, *how)]
    arguments += [text for name in OF_QWEN3 for text in qwen3.write(name, *TWO[name])]
    run_ranks(2, arguments)
    return trainings


@pytest.fixture(scope="module")
def four_processes(trainings: dict[str, Trainings]) -> dict[str, Trainings]:
    bloom = trainings["bloom"]
    run_ranks(4, [text for name, how in FOUR.items() for text in bloom.write(name, *how)])
    return trainings


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """The same losses, norms and held-out scores on the same samples, and the same weights in the end."""
    expected, found = rows(one), rows(other)
    assert [set(row) for row in found] == [set(row) for row in expected]
    for was, row in zip(expected, found, strict=True):
        for name in {"tokens", "target_tokens", "sample", "epoch", "step"} & set(was):
            assert row[name] == was[name]
        for name in {"loss", "loss_by_kind", "reward_margin"} & set(was):
            assert row[name] == pytest.approx(was[name], abs=1e-5)
        if "grad_norm" in was:
            assert row["grad_norm"] == pytest.approx(was["grad_norm"], rel=1e-5)
        for kind, scores in was.get("validation", {}).items():
            assert row["validation"][kind] == pytest.approx(scores, abs=1e-5)
    assert len([row for row in found if "loss" in row]) == STEPS
    ends = (
        json.loads((max((place / "run").glob("checkpoint-*")) / "state.json").read_text())
        for place in (one, other)
    )
    assert len({end["trained_tokens"] for end in ends}) == 1
    weights, others = (load_file(place / "model" / "model.safetensors") for place in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-5, rtol=0)


def reference(of: Trainings, options: dict[str, Any]) -> Path:
    """The same training in one process."""
    learned = {name: options[name] for name in ("method", "objective") if name in options}
    return of.alone("-".join(["alone", *learned.values()]), {}, learned)


@pytest.mark.parametrize(
    ("family", "name"), [*(("bloom", name) for name in TWO), *(("qwen3", name) for name in OF_QWEN3)]
)
def test_two_processes_train_as_one(two_processes: dict[str, Trainings], family: str, name: str) -> None:
    of = two_processes[family]
    assert_same(reference(of, TWO[name][2]), of.folder / name)


def test_what_many_have_trained_opens_on_the_devices_that_are_there(
    two_processes: dict[str, Trainings],
) -> None:
    """As docs/parallel.md says of models larger than a GPU; here there is one device."""
    folder = two_processes["bloom"].folder / "zero-3" / "model"
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ids = torch.arange(20)
    with torch.no_grad():
        mine = load_model(folder)
        states = mine.hidden(PackedInput(ids, ids, [0, 20], ids[:-1], ids[1:]))
        torch.testing.assert_close(states @ mine.head.T, spread(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one(four_processes: dict[str, Trainings], name: str) -> None:
    of = four_processes["bloom"]
    assert_same(reference(of, FOUR[name][2]), of.folder / name)


@pytest.mark.nightly  # compiles C++ for a minute
@pytest.mark.parametrize("family", ["bloom", "qwen3"])
def test_compiled_layers_of_two_processes_learn_the_same(
    trainings: dict[str, Trainings], family: str
) -> None:
    of = trainings[family]
    run_ranks(2, [text for name, how in COMPILED.items() for text in of.write(name, *how)])
    for name, (_, _, options) in COMPILED.items():
        expected, found = (
            [row["loss"] for row in rows(out) if "loss" in row]
            for out in (reference(of, options), of.folder / name)
        )
        assert found == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offload_changes_nothing(trainings: dict[str, Trainings], offload: str) -> None:
    of = trainings["qwen3"]
    assert_same(reference(of, {}), of.alone(f"alone-{offload}", {"offload": offload}, {}))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tp-three", "parallel.tp = 3 and parallel.hsdp = 1 need a multiple of 3 processes and there are 2"),
        ("hsdp-zero-0", "parallel.zero = 0 shards nothing"),
        ("compact", "would drift apart; use parallel.zero 1 to 3"),
        ("dora", "train.method = 'dora' needs whole rows"),
        (
            "qlora-tp",
            "which cannot be split; use parallel.zero 0 to 2 with tp = 1 and without offload = 'all'",
        ),
        (
            "qlora-zero-3",
            "which cannot be split; use parallel.zero 0 to 2 with tp = 1 and without offload = 'all'",
        ),
        (
            "qlora-offload",
            "which cannot be split; use parallel.zero 0 to 2 with tp = 1 and without offload = 'all'",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    two_processes: dict[str, Trainings], name: str, sentence: str
) -> None:
    said = (two_processes["bloom"].folder / f"{name}.error").read_text("utf-8")
    assert sentence in said and "\n" not in said


def test_one_process_is_too_few_for_tensor_parallelism(trainings: dict[str, Trainings]) -> None:
    with pytest.raises(
        RecipeError, match="multiple of 2 processes and there is one; start them with torchrun"
    ):
        trainings["bloom"].alone("too-few", {"tp": 2}, {})


@pytest.mark.parametrize(("family", "tp", "what"), [("bloom", 4, "6 attention"), ("qwen3", 4, "2 key-value")])
def test_tp_must_divide_the_heads(tiny: Callable[[str], Path], family: str, tp: int, what: str) -> None:
    with torch.device("meta"):
        model = build(read_config(tiny(family)))
    with pytest.raises(RecipeError, match=f"parallel.tp = {tp} does not divide the model's {what} heads"):
        require_divisible(model, tp)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_take_the_same_samples_in_the_same_order(trainings: dict[str, Trainings], dp: int) -> None:
    of = trainings["bloom"]
    recipe = of.recipe("order", dp, {}, {})
    tokens = Tokens.open(of.folder / "sft-tokens", "train")
    alone = training_stream(recipe, tokens)
    streams = [training_stream(recipe, tokens, Ranks(torch.device("cpu"), rank, dp)) for rank in range(dp)]
    for number in range(40):  # through several epochs
        together = [one for stream in streams for one in stream.sample_ids(number)]
        assert together == [one for part in range(dp) for one in alone.sample_ids(number * dp + part)]
    assert streams[-1].samples_until(3) == alone.samples_until(3 * dp)


@given(st.integers(0, 30), st.integers(1, 5))
def test_shares_are_equally_long_and_hold_everything(count: int, dp: int) -> None:
    shares = [list(Ranks(torch.device("cpu"), rank, dp).share(range(count))) for rank in range(dp)]
    assert len({len(share) for share in shares}) == 1
    assert {one for share in shares for one in share} == set(range(count))


def test_the_loss_of_all_rows_does_not_know_of_ranks() -> None:
    """Gradients of a whole head are what they were: the place of each target is found, not assumed."""
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, 11, 9))
    total, each = linear_cross_entropy(hidden, head, targets)
    mine = torch.autograd.grad(total, (hidden, head))
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(each, plain.detach())
    for one, other in zip(mine, torch.autograd.grad(plain.sum(), (hidden, head)), strict=True):
        torch.testing.assert_close(one, other)
