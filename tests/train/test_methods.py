"""Adapters and DPO train as peft and the plain formulas do, go on exactly, open in peft, and merge into the base."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from firefly import api
from firefly.data.loader import TrainingStream
from firefly.data.tokens import Tokens
from firefly.errors import ModelError, OutputError, ProofError, RecipeError
from firefly.files import sha256_file
from firefly.model import adapters
from firefly.model.load import load_model, num_parameters
from firefly.model.packed import PackedInput
from firefly.model.score import token_losses
from firefly.recipe import Recipe, TrainSection
from firefly.train.devices import training_flops
from firefly.train.loop import train
from tiny import recipe_table, save_model_dir, write_pairs, write_preferences

CPU = torch.device("cpu")


def rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "run" / "metrics.jsonl").read_text("utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


@pytest.fixture
def recipe(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Recipe]:
    sources = {
        "sft": write_pairs(tmp_path / "pairs.jsonl"),
        "dpo": write_preferences(tmp_path / "preferences.jsonl"),
    }

    def make(name: str = "out", family: str = "bloom", source: str = "", **train: Any) -> Recipe:
        path = sources["dpo" if source == "dpo" or train.get("objective") == "dpo" else "sft"]
        table = recipe_table(tmp_path / name, tiny(family), path, **train)
        table["data"]["sources"] = [{"path": str(path)}]
        return Recipe.from_table(table)

    return make


def log_probs(model: Any, tokens: Tokens, number: int) -> torch.Tensor:
    """Log-probabilities of a sample's learned tokens by a plain transformers or peft model."""
    sample = tokens.sample(number)
    ids = torch.from_numpy(sample.ids.astype("int64"))
    learned = torch.from_numpy(sample.mask.astype(bool))[1:]
    scores = F.log_softmax(model(ids[None]).logits[0, :-1], -1)
    return scores.gather(1, ids[1:, None])[learned, 0]


def plain_losses(model: Any, made: Recipe, steps: int) -> list[float]:
    """What a plain loop over plain models logs: AdamW, warm-up and cosine, one sample at a time."""
    section = made.train
    tokens = Tokens.open(made.out / "tokens", "train")
    is_dpo = section.objective == "dpo"
    size = section.per_device_train_batch_size
    stream = TrainingStream(tokens, size, section.seed, pairs=is_dpo)
    reference = plain_base(made)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=section.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, section.warmup_steps, steps)
    losses = []
    for step in range(steps):
        numbers = stream.batch(step).sample_ids
        if is_dpo:
            total, count = torch.zeros(()), size
            for chosen, rejected in zip(numbers[::2], numbers[1::2], strict=True):
                ratios = []
                for number in (chosen, rejected):
                    with torch.no_grad():
                        base = log_probs(reference, tokens, number).sum()
                    ratios.append(log_probs(model, tokens, number).sum() - base)
                total = total - F.logsigmoid(section.dpo_beta * (ratios[0] - ratios[1]))
        else:
            each = torch.cat([log_probs(model, tokens, number) for number in numbers])
            total, count = -each.sum(), len(each)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses


def peft_twin(made: Recipe, folder: Path) -> Any:
    """The plain peft model that begins where the run begins: the same seed draws the same adapters."""
    torch.manual_seed(made.train.seed)
    model = adapters.load_for_training(Path(made.model.base), made.train, CPU)
    adapters.save_adapter(model, folder)
    return PeftModel.from_pretrained(plain_base(made), folder, is_trainable=True).train()


def plain_base(made: Recipe) -> Any:
    """transformers' model of the base, in NF4 for qlora."""
    if made.train.method != "qlora":
        return AutoModelForCausalLM.from_pretrained(made.model.base).train()
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return AutoModelForCausalLM.from_pretrained(made.model.base, quantization_config=four_bits).train()


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("family", "method", "objective"),
    [
        ("bloom", "lora", "sft"),
        ("qwen3", "dora", "sft"),
        ("bloom", "dora", "dpo"),
        ("qwen3", "lora", "dpo"),
        ("bloom", "qlora", "sft"),
        ("qwen3", "qlora", "dpo"),
        pytest.param("qwen3", "qlora", "sft", marks=NIGHTLY),
        pytest.param("bloom", "qlora", "dpo", marks=NIGHTLY),
        pytest.param("bloom", "dora", "sft", marks=NIGHTLY),
        pytest.param("qwen3", "lora", "sft", marks=NIGHTLY),
        pytest.param("bloom", "lora", "dpo", marks=NIGHTLY),
        pytest.param("qwen3", "dora", "dpo", marks=NIGHTLY),
    ],
)
def test_adapters_learn_as_in_peft(
    recipe: Callable[..., Recipe], tmp_path: Path, family: str, method: str, objective: str
) -> None:
    made = recipe(family=family, method=method, objective=objective, lora_rank=4, lora_alpha=16)
    api.train(made)
    expected = plain_losses(peft_twin(made, tmp_path / "start"), made, 8)
    assert [row["loss"] for row in rows(made.out)] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.05


@pytest.fixture(scope="module")
def encoded(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens of answers and of preferences, made once."""
    made = {}
    for name, write in (("sft", write_pairs), ("dpo", write_preferences)):
        folder = tmp_path_factory.mktemp(name)
        source = write(folder / "data.jsonl")
        table = recipe_table(folder / "out", tiny("bloom"), source)
        table["data"]["sources"] = [{"path": str(source)}]
        api.data(Recipe.from_table(table))
        made[name] = folder / "out" / "tokens"
    return made


@pytest.mark.parametrize("objective", ["sft", "pretrain", "dpo"])
@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_any_method_takes_any_objective(
    tiny: Callable[[str], Path], encoded: dict[str, Path], tmp_path: Path, method: str, objective: str
) -> None:
    """It begins at the base's loss, learns, and leaves a model that plain transformers opens."""
    options = {"method": method, "objective": objective, "eval_steps": 3, "max_steps": 12, "warmup_steps": 1}
    made = Recipe.from_table(recipe_table(tmp_path, tiny("bloom"), tmp_path, **options))
    tokens = encoded["dpo" if objective == "dpo" else "sft"]
    train(made, tiny("bloom"), tokens, tmp_path / "run", tmp_path / "model")
    written = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    held_out = [row["validation"]["all"]["loss"] for row in written if "validation" in row]
    assert held_out[-1] < held_out[0] - 0.02
    if objective == "dpo":
        first = math.log(2)
    else:
        stream = TrainingStream(Tokens.open(tokens, "train"), 4, 42, objective == "pretrain")
        each = token_losses(load_model(tiny("bloom")), PackedInput.of(stream.batch(0), CPU))
        first = float(each.mean())
    four_bits = {"abs": 0.3} if method == "qlora" else {"rel": 1e-5}
    assert written[0]["loss"] == pytest.approx(first, **four_bits)
    ids = torch.arange(4, 60)[None]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny("bloom"))
    assert not torch.allclose(opened(ids).logits, base(ids).logits, atol=1e-3)


def test_four_bits_are_four_bits_and_validation_does_not_disturb_them(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes may repack its codes for inference on a CPU, after which nothing below them would learn."""
    quiet, watched = (
        recipe(name, method="qlora", max_steps=4, eval_steps=steps) for name, steps in (("a", None), ("b", 1))
    )
    seen = []
    real = adapters.attach
    monkeypatch.setattr(adapters, "attach", lambda model, *rest: (seen.append(model), real(model, *rest)))
    api.train(quiet)
    api.train(watched)
    assert [row["loss"] for row in rows(quiet.out)] == [row["loss"] for row in rows(watched.out)]
    held = {name: one for name, one in seen[0].named_parameters() if name.endswith("base_layer.weight")}
    assert sum(one.numel() for one in held.values()) == 2 * 12 * 48 * 48 / 2 and len(held) == 8
    as_lora = adapters.load_for_training(Path(quiet.model.base), TrainSection(method="lora"), CPU)
    assert num_parameters(seen[0]) == num_parameters(as_lora)
    assert training_flops(seen[0]) == training_flops(as_lora)
    assert all(one.dtype == torch.uint8 and not one.requires_grad for one in held.values())


@pytest.mark.parametrize("family", ["bloom", "qwen3"])
def test_full_dpo_equals_the_formula(recipe: Callable[..., Recipe], family: str) -> None:
    made = recipe(family=family, objective="dpo", dpo_beta=0.3, learning_rate=1e-3)
    api.train(made)
    model = AutoModelForCausalLM.from_pretrained(made.model.base).train()
    assert [row["loss"] for row in rows(made.out)] == pytest.approx(plain_losses(model, made, 8), abs=1e-4)
    first, last = rows(made.out)[0], rows(made.out)[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(first["reward_margin"]) < 1e-5
    assert last["reward_accuracy"] == 1.0 and last["reward_margin"] > 0.5


def test_packing_pairs_changes_no_loss(recipe: Callable[..., Recipe]) -> None:
    """A packed row of pairs has the DPO loss of its pairs, each run alone."""
    made = recipe(objective="dpo", method="lora", max_steps=2, warmup_steps=0, per_device_train_batch_size=2)
    made = made.model_copy(update={"data": made.data.model_copy(update={"pack_length": 256})})
    api.train(made)
    stream = TrainingStream(Tokens.open(made.out / "tokens", "train"), 2, 42, pack_length=256, pairs=True)
    ids = stream.batch(0).sample_ids
    assert len(ids) > 4 and all(a % 2 == 0 and b == a + 1 for a, b in zip(ids[::2], ids[1::2], strict=True))
    assert rows(made.out)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows(made.out)[1]["loss"] < 0.69


@pytest.mark.parametrize(
    ("method", "objective"), [("lora", "sft"), ("dora", "dpo"), ("full", "dpo"), ("qlora", "sft")]
)
def test_a_stopped_run_goes_on_exactly(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, method: str, objective: str
) -> None:
    options = {"method": method, "objective": objective, "lora_dropout": 0.1 if method == "lora" else 0.0}
    whole, broken = recipe("whole", **options), recipe("broken", **options)
    api.train(whole)
    from firefly.train import loop

    real = loop.learning_rate_at

    def stop_at_six(step: int, *rest: Any) -> float:
        if step == 6:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        api.train(broken)
    monkeypatch.undo()
    api.train(broken)
    measured = {"tokens_per_s": 0, "memory_bytes": 0, "eta_s": 0}
    for row, other in zip(rows(whole.out), rows(broken.out), strict=True):
        assert row | measured == other | measured
    files = ["model/model.safetensors", *([] if method == "full" else ["adapter/adapter_model.safetensors"])]
    for name in files:
        assert sha256_file(whole.out / name) == sha256_file(broken.out / name)
    saved = load_file(whole.out / "run" / "checkpoint-8" / "model.safetensors")
    assert method == "full" or all(".lora_" in name for name in saved)


@pytest.mark.parametrize(("family", "method"), [("bloom", "dora"), ("qwen3", "lora"), ("llama", "qlora")])
def test_peft_opens_the_adapter_and_the_merged_model_is_the_same(
    recipe: Callable[..., Recipe], family: str, method: str
) -> None:
    made = recipe(family=family, method=method, max_steps=4)
    api.train(made)
    base, ids = Path(made.model.base), torch.arange(4, 60)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, made.out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(made.out / "model")
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert float((adapted - before).abs().max()) > 0.01
    stored = load_file(made.out / "model" / "model.safetensors")
    assert stored.keys() == load_file(base / "model.safetensors").keys() - {"transformer.lm_head.weight"}
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (family != "llama")


def test_merge_says_what_it_changed_and_refuses_a_wrong_merge(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(method="lora", max_steps=4)
    api.train(made)
    result = api.merge(made.out, tmp_path / "merged")
    assert result.merged_layers == 8 and result.rounding_difference == 0.0
    assert result.merge_difference < 1e-4 * result.largest_logit
    assert sha256_file(tmp_path / "merged" / "model.safetensors") == sha256_file(
        made.out / "model" / "model.safetensors"
    )
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == (
        made.out / "model" / "chat_template.jinja"
    ).read_text()
    with pytest.raises(OutputError, match="not empty"):
        api.merge(made.out, tmp_path / "merged")
    real = adapters.fold

    def careless(model: Any) -> int:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.weight"):
                parameter.data *= 0.99
        return real(model)

    monkeypatch.setattr(adapters, "fold", careless)
    with pytest.raises(ProofError, match="moved a logit"):
        api.merge(made.out, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_merging_into_bf16_tells_the_rounding(tmp_path: Path) -> None:
    base = save_model_dir(tmp_path / "base", "qwen3")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    torch.manual_seed(0)
    section = TrainSection(method="lora", lora_target_modules=["q_proj", "mlp.down_proj"])
    model = adapters.load_for_training(base, section, CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapters.save_adapter(model, tmp_path / "adapter")
    result = api.merge(tmp_path / "adapter", tmp_path / "merged")
    assert (result.dtype, result.merged_layers) == ("bfloat16", 4)
    assert 0 < result.rounding_difference < 0.1 * result.largest_logit
    names = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name in load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    }
    assert names == {"q_proj", "down_proj"}


def test_an_adapter_of_plain_peft_merges(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny("bloom"))
    theirs = get_peft_model(
        plain, LoraConfig(r=3, target_modules=["query_key_value"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    api.merge(tmp_path / "adapter", tmp_path / "merged", base=tiny("bloom"))
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(merged, theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    shutil.rmtree(tmp_path / "merged")
    with pytest.raises(ModelError, match=r"LoRA factor of a linear layer|does not fit"):
        api.merge(tmp_path / "adapter", tmp_path / "merged", base=tiny("qwen3"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query_key_value", "word_embeddings"]},
        {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_on_the_vocabulary_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Folding it in would untie the head."""
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("bloom")), LoraConfig(r=2, **options))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="only such adapters can be merged"):
        api.merge(tmp_path / "adapter", tmp_path / "merged", base=tiny("bloom"))


def test_what_cannot_be_merged_is_one_sentence(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe(max_steps=2)
    api.train(made)
    with pytest.raises(ModelError, match="a run without a finished adapter"):
        api.merge(made.out, tmp_path / "merged")
    with pytest.raises(ModelError, match="neither a run nor an adapter"):
        api.merge(tmp_path / "nowhere", tmp_path / "merged")


@pytest.mark.parametrize(
    ("method", "objective"),
    [("full", "sft"), ("dora", "pretrain"), pytest.param("lora", "sft", marks=NIGHTLY)],
)
def test_preferences_serve_the_other_objectives(
    recipe: Callable[..., Recipe], method: str, objective: str
) -> None:
    """Of a pair's answers the chosen one alone is learned."""
    made = recipe(source="dpo", method=method, objective=objective, max_steps=2)
    result = api.train(made).stages["train"].result
    assert result["validation"]["all"]["loss"] > 0
    tokens = Tokens.open(made.out / "tokens", "train")
    numbers = TrainingStream(tokens, 4, made.train.seed).batch(0).sample_ids
    used = [tokens.sample(number) for number in numbers if number % 2 == 0]
    learned = [len(one.ids) - 1 if objective == "pretrain" else int(one.mask.sum()) for one in used]
    assert len(used) == 4 and rows(made.out)[0]["target_tokens"] == sum(learned)


def test_checkpointing_and_bf16_take_adapters(recipe: Callable[..., Recipe]) -> None:
    options = {"method": "lora", "max_steps": 3}
    plain = recipe("plain", **options)
    api.train(plain)
    recomputed = recipe("recomputed", gradient_checkpointing=True, **options)
    api.train(recomputed)
    half = recipe("half", precision="bf16", **options)
    api.train(half)
    expected = [row["loss"] for row in rows(plain.out)]
    assert [row["loss"] for row in rows(recomputed.out)] == pytest.approx(expected, abs=1e-5)
    assert [row["loss"] for row in rows(half.out)] == pytest.approx(expected, rel=0.03)


def test_the_frozen_base_in_bf16_gives_the_same_numbers(tiny: Callable[[str], Path]) -> None:
    """Autocast would round the float32 matrices to bf16 anyway."""
    from firefly.data.loader import pack
    from firefly.model.packed import PackedInput
    from firefly.model.score import batch_loss

    ids = torch.arange(4, 60).numpy()
    batch = PackedInput.of(pack([(ids, ids > 0)]), CPU)
    section = TrainSection(method="lora")
    held = adapters.load_for_training(tiny("bloom"), section, CPU, bf16=True)
    rounded = adapters.load_for_training(tiny("bloom"), section, CPU, bf16=False)
    assert any(parameter.dtype == torch.bfloat16 for parameter in held.parameters())
    assert all(p.dtype == torch.float32 for p in held.parameters() if p.requires_grad)
    assert torch.equal(batch_loss(held, batch, True)[1], batch_loss(rounded, batch, True)[1])


def test_sentences_for_what_is_not_there(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(RecipeError, match=r"pip install 'firefly-zh\[qlora\]'"):
            api.train(recipe(method="qlora"))
    assert not (tmp_path / "out").exists(), "it was found out before any work"
    with pytest.raises(RecipeError, match=r"no linear layer 'q_prj'; .*query_key_value"):
        api.train(recipe(method="lora", lora_target_modules=["q_prj"]))
    with pytest.raises(Exception, match="learns from preferences"):
        api.train(
            recipe("other", objective="dpo", source="").model_copy(update={"data": recipe(source="sft").data})
        )
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"pip install 'firefly-zh\[lora\]'"):
        api.train(recipe("none", method="lora"))


def test_a_head_below_adapters_gets_no_gradient(tiny: Callable[[str], Path]) -> None:
    model = adapters.load_for_training(tiny("qwen3"), TrainSection(method="lora"), CPU)
    assert not model.head.requires_grad
    assert torch.equal(model.head, load_model(tiny("qwen3")).head)
