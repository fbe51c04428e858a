"""C-Eval and CMMLU from local files, asked and scored by lm-evaluation-harness.

    DIR/ceval/dev/law_dev.csv   DIR/ceval/val/law_val.csv       id, question, A, B, C, D, answer, explanation
    DIR/cmmlu/dev/law.csv       DIR/cmmlu/test/law.csv          Question, A, B, C, D, Answer

Questions, few-shot examples, wording and scoring are the harness's own tasks; only where the data lies is replaced, and
the model is ours: contexts that several choices share are read once, packed. docs/evaluate.md says where the data is.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firefly.console import progress
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, choices
from firefly.evaluate.metrics import bootstrap
from firefly.model.load import load_model
from firefly.model.score import log_probabilities

_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's files lie and which of the harness's tasks they belong to, `{}` standing for a subject."""

    task: str
    split: str
    questions: str
    examples: str


BENCHMARKS = {
    "ceval": Benchmark("ceval-valid_{}", "val", "val/{}_val.csv", "dev/{}_dev.csv"),
    "cmmlu": Benchmark("cmmlu_{}", "test", "test/{}.csv", "dev/{}.csv"),
}


@dataclass(frozen=True)
class BenchmarkScore:
    """Accuracy over all questions with its 95 % confidence interval, their number, and accuracy by subject."""

    accuracy: float
    interval: tuple[float, float]
    num_questions: int
    subjects: dict[str, float]


@dataclass(frozen=True)
class HarnessResult:
    """Scores by model and benchmark; `harness` is the harness's version."""

    models: dict[str, dict[str, BenchmarkScore]]
    num_shots: int
    harness: str

    def lines(self) -> list[str]:
        """The scores as lines of text."""
        made = [f"{self.num_shots}-shot accuracy, lm-evaluation-harness {self.harness}"]
        for name, scores in self.models.items():
            for benchmark, score in scores.items():
                low, high = score.interval
                made.append(
                    f"{name:<16}{benchmark:<8}{score.accuracy:.1%} [{low:.1%}, {high:.1%}], "
                    f"{score.num_questions:,} questions, {len(score.subjects)} subject(s)"
                )
        return made


def run_harness(
    models: Mapping[str, tuple[Path, int]],
    benchmarks: Sequence[str],
    data: Path,
    num_shots: int,
    bf16: bool = False,
) -> HarnessResult:
    """Score models, each a directory and the tokens that it reads at most, on benchmarks whose files lie in `data`.

    Raises `InputError` for an unknown benchmark, missing files, or when lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "Benchmarks need lm-evaluation-harness; install it with: pip install 'firefly-zh[eval]'."
        )
    found = {name: _subjects(name, data) for name in dict.fromkeys(benchmarks)}
    from importlib.metadata import version

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores: dict[str, dict[str, BenchmarkScore]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = {name: _write_tasks(name, data, subjects, Path(folder)) for name, subjects in found.items()}
        manager = TaskManager(include_path=folder, include_defaults=False)
        for name, (directory, context_tokens) in models.items():
            model = _language_model(name, directory, context_tokens, device, bf16)
            scores[name] = {}
            for benchmark, by_task in tasks.items():
                run = simple_evaluate(
                    model,
                    tasks=list(by_task),
                    num_fewshot=num_shots,
                    task_manager=manager,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
                right = {
                    subject: [float(sample["acc"]) for sample in run["samples"][task]]
                    for task, subject in by_task.items()
                }
                scores[name][benchmark] = _score(right)
    return HarnessResult(scores, num_shots, version("lm_eval"))


def _score(right: Mapping[str, Sequence[float]]) -> BenchmarkScore:
    rows = np.asarray([[one, 1.0] for answers in right.values() for one in answers])
    accuracy, total = float(rows[:, 0].mean()), len(rows)
    ends = bootstrap(rows, lambda sums: {"accuracy": float(sums[0] / sums[1])})
    return BenchmarkScore(
        accuracy,
        ends.get("accuracy", (accuracy, accuracy)),
        total,
        {subject: float(np.mean(answers)) for subject, answers in sorted(right.items())},
    )


def _place(benchmark: str, data: Path) -> Path:
    return data / benchmark if (data / benchmark).is_dir() else data


def _subjects(name: str, data: Path) -> list[str]:
    """The subjects whose questions lie there."""
    if name not in BENCHMARKS:
        raise InputError(f"Unknown benchmark '{name}': {choices(name, BENCHMARKS)}.")
    before, after = BENCHMARKS[name].questions.split("{}")
    place = _place(name, data)
    found = sorted(path.name.removesuffix(after) for path in place.glob(f"{before}*{after}"))
    if not found:
        raise InputError(
            f"{place} has no {BENCHMARKS[name].questions.format('SUBJECT')}, so there is nothing to ask; "
            "docs/evaluate.md says where to get the data and how to lay it out."
        )
    for subject in found:
        path = place / BENCHMARKS[name].examples.format(subject)
        if not path.is_file():
            raise InputError(f"{path} with the few-shot examples is missing; unpack the data set anew.")
    return found


def _write_tasks(name: str, data: Path, subjects: Sequence[str], folder: Path) -> dict[str, str]:
    """Write each subject's task for the harness: its own, read from the local files; returns task → subject.

    Raises `InputError` for a subject that the harness does not know.
    """
    import lm_eval.tasks

    benchmark, place = BENCHMARKS[name], _place(name, data).absolute()
    made = {}
    for subject in subjects:
        original = Path(lm_eval.tasks.__file__).parent / name / f"{benchmark.task.format(subject)}.yaml"
        if not original.is_file():
            raise InputError(
                f"{place}: the harness knows no subject '{subject}' of {name}; rename the file, or take it out."
            )
        files = {
            benchmark.split: str(place / benchmark.questions.format(subject)),
            "dev": str(place / benchmark.examples.format(subject)),
        }
        task = f"local_{benchmark.task.format(subject)}"
        settings = {
            "include": str(original),
            "task": task,
            "dataset_path": "csv",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        }
        (folder / f"{task}.yaml").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        made[task] = subject
    return made


def _language_model(name: str, directory: Path, context_tokens: int, device: torch.device, bf16: bool) -> Any:
    """Our model as the harness wants one."""
    from lm_eval.api.model import TemplateLM

    tokenizer = ModelTokenizer.load(directory)
    model = load_model(directory, device, torch.bfloat16 if bf16 else torch.float32).eval()

    class Packed(TemplateLM):  # type: ignore[misc] # the harness has no types
        """Log-likelihoods of continuations; what several have in common is read once."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            specials = (
                add_special_tokens is not False
            )  # those that tokenizer.json itself adds, such as Llama's <s>
            return list(tokenizer.rust.encode(string, add_special_tokens=specials).ids)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            wanted: dict[tuple[int, ...], list[int]] = {}
            for number, (_, context, continuation) in enumerate(requests):
                read = [*context, *continuation][-context_tokens - 1 : -1]
                wanted.setdefault(tuple(read), []).append(number)
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            with progress(f"benchmark {name}", len(wanted), "contexts") as bar:
                for group in _groups(list(wanted)):
                    counts = [max(len(requests[number][2]) for number in wanted[text]) for text in group]
                    tables = log_probabilities(model, group, counts, device)
                    for text, table in zip(group, tables, strict=True):
                        for number in wanted[text]:
                            ids = torch.tensor(requests[number][2], device=device)
                            rows = table[-len(ids) :]
                            total = float(rows.gather(1, ids[:, None]).sum())
                            answers[number] = (total, bool((rows.argmax(1) == ids).all()))
                    bar.advance(len(group))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("the benchmarks here ask for choices alone")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("the benchmarks here ask for choices alone")

    return Packed()


def _groups(texts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Texts of like length, together up to a number of tokens."""
    group: list[tuple[int, ...]] = []
    for text in sorted(texts, key=len):
        if group and sum(map(len, group)) + len(text) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group
