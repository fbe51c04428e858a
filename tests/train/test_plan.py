"""The plan: peak memory as the allocator counts it, refusals with advice that works, and a probe without traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.profiler import ProfilerActivity, profile

from firefly import api
from firefly.cli import main
from firefly.data.loader import TrainingStream
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.errors import RecipeError, TrainingError
from firefly.files import sha256_file, write_json
from firefly.model.load import load_model, num_parameters, read_config
from firefly.recipe import Recipe, TrainSection
from firefly.train import objectives, plan
from firefly.train.gpus import Device, find_gpu
from firefly.train.loop import train
from firefly.train.memory import BatchShape, at_depth, memory_at_peak, walk_phases
from firefly.train.optim import make_optimizer
from firefly.train.plan import estimate_from, make_plan
from tiny import recipe_table, save_tokenizer, write_pairs


def make_tokens(
    folder: Path, model: Path, num_samples: int = 48, longest: int = 160, pairs: bool = False
) -> Path:
    """Random samples of the article's lengths, 45 % prompt."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(110), 0.7, num_samples).astype(int), 16, longest)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = random.integers(4, 500, borders[-1]).astype(np.uint16)
    mask = np.concatenate([np.arange(length) >= int(0.45 * length) for length in lengths]).astype(np.uint8)
    for split, count in (("train", num_samples), ("validation", 4)):
        place = folder / split
        place.mkdir(parents=True)
        ids[: borders[count]].tofile(place / "tokens.bin")
        mask[: borders[count]].tofile(place / "mask.bin")
        np.save(place / "borders.npy", borders[: count + 1])
        np.save(place / "kinds.npy", np.zeros(count, np.uint16))
        np.save(place / "bytes.npy", lengths[:count].astype(np.int64))
        np.save(place / "origins.npy", np.arange(count, dtype=np.int64))
    index = {
        "tokens": {"train": int(borders[-1]), "validation": int(borders[4])},
        "kinds": ["Random"],
        "dtype": "uint16",
        "max_seq_length": longest,
        "pairs": pairs,
        "tokenizer_sha256": ModelTokenizer.load(model).sha256,
        "sha256": {
            p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()
        },
    }
    write_json(folder / "index.json", index)
    return folder


def recipe_of(folder: Path, model: Path, **train: Any) -> Recipe:
    return Recipe.from_table(
        {
            "name": "planned",
            "output_dir": str(folder),
            "model": {"base": str(model)},
            "data": {"max_seq_length": 160, "sources": [{"path": "none"}]},
            "train": {"max_steps": 3, "warmup_steps": 0, "report_to": [], **train},
        }
    )


_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384}
SMALL: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 5, "n_head": 4, "vocab_size": 3001},
    "qwen3": {
        "num_hidden_layers": 5,
        "head_dim": 32,
        "vocab_size": 3001,
        "tie_word_embeddings": True,
        **_GROUPED,
    },
    "llama": {"num_hidden_layers": 3, "vocab_size": 12_011, **_GROUPED},
}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model large enough that its tensors are what counts, stored in bf16 so that loading allocates, and tokens."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = save_in_bf16(folder / "model", family)
            make_tokens(folder / "pairs", model, pairs=True)
            made[family] = model, make_tokens(folder / "tokens", model)
        return made[family]

    return get


def save_in_bf16(folder: Path, family: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    save_tokenizer(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(family, hidden_size=128, **ids, **SMALL[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def allocated_peak(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    now = most = 0
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = [one for one in watched.profiler.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CONFIGURATIONS = [
    ("bloom", {"per_device_train_batch_size": 2}),
    ("bloom", {"per_device_train_batch_size": 16}),
    ("bloom", {"per_device_train_batch_size": 16, "gradient_checkpointing": True}),
    ("bloom", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}),
    ("qwen3", {"per_device_train_batch_size": 16}),
    ("qwen3", {"per_device_train_batch_size": 12, "gradient_checkpointing": True}),
    ("llama", {"per_device_train_batch_size": 1}),
    ("llama", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}),
    ("bloom", {"per_device_train_batch_size": 8, "precision": "bf16"}),
    ("bloom", {"per_device_train_batch_size": 8, "weights": "bf16_kahan", "optimizer": "adamw_8bit"}),
    ("bloom", {"per_device_train_batch_size": 8, "method": "lora"}),
    ("qwen3", {"per_device_train_batch_size": 8, "method": "lora", "precision": "bf16"}),
    ("qwen3", {"per_device_train_batch_size": 4, "method": "dora", "gradient_checkpointing": True}),
    ("bloom", {"per_device_train_batch_size": 4, "objective": "dpo"}),
    ("qwen3", {"per_device_train_batch_size": 4, "objective": "dpo", "method": "lora"}),
]


@pytest.mark.parametrize(
    ("family", "options"),
    CONFIGURATIONS,
    ids=[f"{family}-{'-'.join(str(v) for v in options.values())}" for family, options in CONFIGURATIONS],
)
def test_predicted_peak_is_what_the_allocator_counts(
    small: Callable[[str], tuple[Path, Path]], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    model, tokens = small(family)
    if options.get("objective") == "dpo":
        tokens = tokens.with_name("pairs")
    recipe = recipe_of(tmp_path, model, **options)
    measured = allocated_peak(lambda: train(recipe, model, tokens, tmp_path / "run", tmp_path / "out"))
    device = Device("here", "cpu", 1 << 40)
    made = make_plan(recipe, read_config(model), estimate_from(tokens), device)
    assert made.memory.tensors == pytest.approx(measured, rel=0.1)
    assert made.fits and not made.advice


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["bloom", "qwen3"])
def test_a_deep_model_extends_as_if_walked_through(
    small: Callable[[str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    bf16: bool,
    checkpointing: bool,
) -> None:
    config = at_depth(read_config(small(family)[0]), 9)
    train = TrainSection(gradient_checkpointing=checkpointing)
    shapes = BatchShape(600, 300, 300), BatchShape(300, 300, 150)
    extended = memory_at_peak(walk_phases(config, train, *shapes, bf16, "cpu"), "cpu")
    monkeypatch.setattr("firefly.train.memory._DEPTHS", (2, 100))
    walked = memory_at_peak(walk_phases(config, train, *shapes, bf16, "cpu"), "cpu")
    assert extended.total == pytest.approx(walked.total, rel=0.01)
    assert extended.weights == walked.weights and extended.optimizer == walked.optimizer


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": 1},
        {"weights": "bf16_stochastic", "optimizer": "adamw_8bit"},
        {"objective": "dpo", "method": "lora"},
    ],
    ids=["sft", "compact", "dpo-lora"],
)
def test_a_step_asks_the_device_for_no_number(
    small: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The plan walks through a real step on tensors without data, where to ask for a number is an error."""
    config, train = at_depth(read_config(small("bloom")[0]), 2), TrainSection(**options)
    shapes = BatchShape(600, 300, 300), BatchShape(300, 300, 150)
    walk_phases(config, train, *shapes, False, "cpu")
    real = objectives.linear_cross_entropy if "objective" in options else objectives.batch_loss

    def asking(*arguments: Any) -> Any:
        total, each = real(*arguments)
        assert float(total.detach()) >= 0
        return total, each

    monkeypatch.setattr(objectives, real.__name__, asking)
    with pytest.raises(DataDependentOutputException):
        walk_phases(config, train, *shapes, False, "cpu")


@pytest.fixture
def recipe(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Recipe]:
    source = write_pairs(tmp_path / "pairs.jsonl")

    def make(name: str = "out", **train: Any) -> Recipe:
        return Recipe.from_table(recipe_table(tmp_path / name, tiny("bloom"), source, **train))

    return make


def test_the_probe_leaves_no_trace(recipe: Callable[..., Recipe]) -> None:
    """Losses and weights are the same bits with and without the check."""
    for name, check in (("with", True), ("without", False)):
        api.train(recipe(name, check=check))
    one, two = (recipe(name).out for name in ("with", "without"))
    losses = [
        [row.get("loss") for row in map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())]
        for out in (one, two)
    ]
    assert losses[0] == losses[1]
    assert sha256_file(one / "model" / "model.safetensors") == sha256_file(
        two / "model" / "model.safetensors"
    )


def test_the_probe_runs_the_batch_with_most_tokens(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(max_steps=5, gradient_accumulation_steps=2)
    seen: list[int] = []
    real = objectives.batch_loss

    def watched(model: Any, batch: Any, bf16: bool) -> Any:
        seen.append(len(batch.input_ids))
        return real(model, batch, bf16)

    monkeypatch.setattr(objectives, "batch_loss", watched)
    api.train(made)
    stream = TrainingStream(Tokens.open(made.out / "tokens", "train"), 4, made.train.seed)
    sizes = [len(stream.batch(number).input_ids) for number in range(10)]
    assert seen[:2] == [max(sizes), sizes[0]] and stream.batch_tokens(10).tolist() == sizes


def test_the_probe_restores_random_state_and_gradients(
    recipe: Callable[..., Recipe], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe()
    api.data(made)
    model = load_model(tiny("bloom"))
    optimizer = make_optimizer(model.parameters(), made.train)
    real = objectives.batch_loss

    def random(*arguments: Any) -> Any:
        torch.rand(3)  # as dropout would
        return real(*arguments)

    monkeypatch.setattr(objectives, "batch_loss", random)
    before = torch.get_rng_state()
    stream = TrainingStream(Tokens.open(made.out / "tokens", "train"), 4, made.train.seed)
    plan.try_largest_batch(model, optimizer, objectives.NextToken(bf16=False), stream, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters()) and not optimizer.state


def test_memory_that_runs_out_in_the_probe_is_one_sentence(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(objectives, "batch_loss", full)
    with pytest.raises(TrainingError, match=r"largest batch .*gradient_checkpointing = true"):
        api.train(recipe())


def test_train_refuses_what_memory_cannot_hold_and_its_advice_fits(
    small: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = small("bloom")
    made = recipe_of(tmp_path, model, per_device_train_batch_size=16)
    config, estimate = read_config(model), estimate_from(tokens)
    most = make_plan(made, config, estimate, Device("here", "cpu", 1 << 40)).memory_bytes
    scarce = Device("here", "cpu", most * 95 // 100)
    monkeypatch.setattr(plan, "this_device", lambda: scarce)
    with pytest.raises(TrainingError, match=r"train\.per_device_train_batch_size=8.*train\.check = false"):
        train(made, model, tokens, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "run").exists()
    refused = make_plan(made, config, estimate, scarce)
    assert not refused.fits and refused.advice
    sizes = [one.memory_bytes for one in refused.advice]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= scarce.memory_bytes
    table = made.model_dump()
    for override in refused.advice[0].change.split():
        name, _, value = override.partition("=")
        section, key = name.split(".")
        table[section][key] = json.loads(value)
    assert make_plan(Recipe.from_table(table), config, estimate, scarce).fits


def test_train_refuses_what_the_disk_cannot_hold(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_disk_bytes", lambda _: 1000)
    with pytest.raises(TrainingError, match=r"of disk and .* has 0 MiB free"):
        api.train(recipe())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h200", "H200"),
        ("RTX 4090", "4090"),
        ("A100", "A100-80GB"),
        ("a100-40gb", "A100-40GB"),
        ("24GB", "a GPU of 24 GB"),
    ],
)
def test_gpus_are_found_by_what_people_call_them(text: str, name: str) -> None:
    assert find_gpu(text).name == name


def test_an_unknown_gpu_is_a_sentence() -> None:
    with pytest.raises(RecipeError, match="did you mean '4090'"):
        find_gpu("4091")


def test_the_verb_needs_no_weights(
    small: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.json is enough; parameters are those of the model, a tied matrix once; nothing is written."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(read_config(small("bloom")[0])))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_of(tmp_path / "out", base).to_toml())
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(path), "--gpu", "H200", "--json"])
    assert not stopped.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"]["total"] == num_parameters(load_model(small("bloom")[0]))
    assert result["fits"] and result["hours"] > 0 and not (tmp_path / "out").exists()
    assert sum(result["memory"].values()) == result["memory_bytes"]


@pytest.mark.parametrize(("share", "wanted"), [(110, "none"), (80, "optimizer"), (1, None)])
def test_offload_auto_takes_the_least_that_fits(
    small: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: int,
    wanted: str | None,
) -> None:
    model, tokens = small("bloom")
    config, data = read_config(model), [Tokens.open(tokens, split) for split in ("train", "validation")]
    made = recipe_of(tmp_path, model, per_device_train_batch_size=2)
    made = made.model_copy(update={"parallel": made.parallel.model_copy(update={"offload": "auto"})})
    whole = make_plan(made, config, estimate_from(tokens), Device("large", "cuda", 1 << 40)).memory_bytes
    framework = 700 << 20
    room = Device("small", "cuda", framework + (whole - framework) * share // 100)
    monkeypatch.setattr(plan, "this_device", lambda: room)
    ranks: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1, from_main=lambda decide: decide())
    if wanted is None:
        with pytest.raises(TrainingError, match="do not suffice"):
            plan.with_offload(made, config, *data, ranks)
        return
    assert plan.with_offload(made, config, *data, ranks).parallel.offload == wanted
    ranks.device = torch.device("cpu")
    assert plan.with_offload(made, config, *data, ranks).parallel.offload == "none"
