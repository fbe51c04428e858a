"""How fast answers are generated, against transformers' generate, and how long a whole evaluation takes.

    python bench/evaluate.py [--quick] [--model DIR] [--threads 2]

The embedded base (or DIR) answers held-out questions of the demo's tasks on the CPU, in float32, greedily. Each answer
has as many tokens as its reference, and end tokens do not end it: so the lengths are real ones, whatever the model
makes of the questions.

    firefly   our generator, 16 answers at a time
    loop      transformers' generate, one prompt after the other
    batches   transformers' generate, 16 prompts at a time in the order they come, padded on the left

Each way answers the same prompts, in alternation; counted are the tokens of the answers. Then `firefly evaluate`
measures 2,000 examples as its users do: losses, sampled answers, metrics, intervals, report. A base that was not tuned
answers in a word or two; DIR should be the demo's own model (out/demo/model) for that time to mean something.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rows
from firefly.console import quiet
from firefly.data.chatformat import open_format
from firefly.data.dataset import build_dataset
from firefly.data.tokenizer import ModelTokenizer
from firefly.evaluate.measure import Settings
from firefly.evaluate.questions import Questions, read_questions
from firefly.evaluate.run import evaluate
from firefly.files import locate
from firefly.model.generate import Prompt, open_generator
from firefly.model.hub import quiet_transformers
from firefly.recipe import GenerationSection, Recipe

BATCH = 16
GREEDY = GenerationSection(do_sample=False, repetition_penalty=1.0)


def demo_questions(folder: Path, count: int) -> Questions:
    """The first `count` held-out examples of the demo's data, of which a third is held out for this."""
    recipe = Recipe.load(locate("demo:demo.toml"), ["data.validation_fraction=0.33"])
    build_dataset(recipe.data, folder / "dataset")
    found = read_questions(folder / "dataset")
    shares = {kind: iter(group) for kind, group in found.items()}
    chosen: Questions = {kind: [] for kind in found}
    while (
        sum(map(len, chosen.values())) < count and shares
    ):  # the kinds in turn, so that small ones are there
        for kind in list(shares):
            example = next(shares[kind], None)
            if example is None:
                del shares[kind]
            elif sum(map(len, chosen.values())) < count:
                chosen[kind].append(example)
    return chosen


def prompts_of(model: Path, questions: Questions, count: int) -> list[Prompt]:
    """Prompts of the kinds in turn, each to be answered with as many tokens as its reference has."""
    tokenizer = ModelTokenizer.load(model)
    chat_format = open_format("firefly", tokenizer)
    asked = [
        Prompt(
            chat_format.render(group[number].messages[:-1]).ids, len(tokenizer.encode(group[number].target))
        )
        for number in range(max(map(len, questions.values())))
        for group in questions.values()
        if number < len(group)
    ]
    return asked[:count]


def firefly_answers(model: Path) -> Callable[[Sequence[Prompt]], list[list[int]]]:
    """Our generator."""
    generator = replace(open_generator(model, "cpu"), eos_ids=())

    def answer(prompts: Sequence[Prompt]) -> list[list[int]]:
        found = dict(generator.answers(prompts, GREEDY, BATCH))
        return [found[number] for number in range(len(prompts))]

    return answer


def hub_answers(model: Path, batch_size: int) -> Callable[[Sequence[Prompt]], list[list[int]]]:
    """transformers' generate; a batch runs to its longest answer, and each is cut at its own length."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        network.generation_config.eos_token_id = None
    end = ModelTokenizer.load(model).eos_id

    def answer(prompts: Sequence[Prompt]) -> list[list[int]]:
        answers = []
        for start in range(0, len(prompts), batch_size):
            group = prompts[start : start + batch_size]
            width = max(len(prompt.ids) for prompt in group)
            padding = [width - len(prompt.ids) for prompt in group]
            ids = torch.tensor([[end] * pad + list(one.ids) for pad, one in zip(padding, group, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
            out = network.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(prompt.max_new_tokens for prompt in group),
                pad_token_id=end,
            )
            rows_of_ids = out[:, width:].tolist()
            answers += [ids[: one.max_new_tokens] for one, ids in zip(group, rows_of_ids, strict=True)]
        return answers

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few prompts, for a look")
    parser.add_argument("--model", type=Path, help="a BLOOM directory instead of the embedded base")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    num_prompts, repeats, num_examples = (24, 2, 200) if arguments.quick else (96, 3, 2000)
    model = arguments.model or locate("demo:base")
    quiet()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        questions = demo_questions(Path(folder), num_examples)
        prompts = prompts_of(model, questions, num_prompts)
        ways = {
            "firefly": firefly_answers(model),
            "loop": hub_answers(model, 1),
            "batches": hub_answers(model, BATCH),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        for way in ways.values():
            way(prompts[:2])  # warm up
        for turn in range(repeats):  # alternating, so that a machine that slows down slows all
            for name, answer in ways.items():
                start_s = time.perf_counter()
                answers[name] = answer(prompts)
                speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - start_s))
            told = ", ".join(f"{name} {found[-1]:,.0f} tokens/s" for name, found in speeds.items())
            print(f"run {turn + 1}: {told}", flush=True)
        same = sum(one == other for one, other in zip(answers["firefly"], answers["loop"], strict=True))
        print(f"{same} of {num_prompts} answers are the same tokens as in the loop")
        recipe = Recipe.load(locate("demo:demo.toml"), ["evaluate.generations_per_kind=2000"])
        start_s = time.perf_counter()
        evaluate({"model": model}, questions, Settings.of(recipe), Path(folder) / "evaluation")
        evaluation_s = time.perf_counter() - start_s
        print(f"firefly evaluate, {sum(map(len, questions.values())):,} examples: {evaluation_s:.1f} s")
    ratios = {
        name: [ours / peer for ours, peer in zip(speeds["firefly"], speeds[name], strict=True)]
        for name in ("loop", "batches")
    }
    row = {
        "model": arguments.model.name if arguments.model else "demo:base",
        "prompts": num_prompts,
        "batch": BATCH,
        "threads": arguments.threads,
        "runs": repeats,
        **{f"{name}_tokens_per_s": round(statistics.median(found), 1) for name, found in speeds.items()},
        "vs_generate_loop": round(statistics.median(ratios["loop"]), 2),
        "vs_generate_loop_min": round(min(ratios["loop"]), 2),
        "vs_generate_loop_max": round(max(ratios["loop"]), 2),
        "vs_generate_batches": round(statistics.median(ratios["batches"]), 2),
        "same_answers": same,
        "examples": num_examples,
        "evaluation_s": round(evaluation_s, 1),
    }
    print(f"appended to {rows.append('evaluate', [row]).relative_to(rows.ROOT)}")
    rows.finish(
        {
            "vs_generate_loop": statistics.median(ratios["loop"]),
            "vs_generate_batches": statistics.median(ratios["batches"]),
            "evaluation_of_2000_s": evaluation_s * 2000 / num_examples,
        }
    )


if __name__ == "__main__":
    main()
