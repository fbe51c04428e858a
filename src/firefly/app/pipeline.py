"""The pipeline: dataset → prune → tokens → train → evaluate, each stage skipped when it is already done.

Every stage writes its result atomically and then leaves a stamp, `OUT/.stages/NAME.json`, with a fingerprint of
all it depended on. A stage whose fingerprint still holds is skipped; a changed source or option redoes it and
whatever comes after. A run with checkpoints keeps its recipe: another one is refused before anything is touched.
Killed anywhere and run again, a run ends with the same bytes.

    OUT/dataset   examples, rejects, card.json         OUT/run         checkpoints, metrics, curves.png
    OUT/pruned    the pruned base, prune.json          OUT/model       the finished model directory
    OUT/tokens    ids, masks, borders, lengths.png     OUT/adapter     of lora, dora, qlora: merged in OUT/model
                                                       OUT/evaluation  report.html, results.json, answers.jsonl
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import firefly
from firefly.console import say
from firefly.data.chatformat import open_format
from firefly.data.dataset import build_dataset
from firefly.data.readers import files_of
from firefly.data.tasks import task_files_mark
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import encode_dataset
from firefly.errors import CheckpointError, OutputError, RecipeError
from firefly.evaluate.measure import Settings
from firefly.evaluate.questions import read_questions
from firefly.evaluate.run import evaluate
from firefly.files import exclusive, locate, sha256_file, sha256_json, write_atomic, write_json, writing_to
from firefly.model.adapters import empty_model, require_method
from firefly.model.hub import resolve
from firefly.model.load import check_model, read_config
from firefly.model.shards import weight_files
from firefly.model.split import require_divisible
from firefly.prune.prune import prune_model
from firefly.recipe import Recipe
from firefly.train.checkpoint import find_checkpoints
from firefly.train.loop import HARMLESS, TrainResult, train
from firefly.train.parallel import require_layout
from firefly.train.reporters import require_reporters
from firefly.train.team import ALONE, Team

StageName = Literal["dataset", "prune", "tokens", "train", "evaluate"]
_BEFORE_TRAINING: tuple[StageName, ...] = ("dataset", "prune", "tokens")
STAGES: tuple[StageName, ...] = ("dataset", "prune", "tokens", "train", "evaluate")
_OF_TOKENS = {"max_seq_length", "overlong", "allow_lost_targets", "chat_format"}
"""Options of the data section that the tokens stage depends on, and the dataset stage does not."""
_HARMLESS_DATA = {"engine", "num_workers"}
"""Options of the data section that change no result."""


@dataclass(frozen=True)
class StageResult:
    """One stage: its result as JSON values, how long it took, and whether it was there already."""

    result: dict[str, Any]
    wall_s: float
    skipped: bool


@dataclass(frozen=True)
class RunResult:
    """A run up to its last asked stage."""

    name: str
    output: str
    stages: dict[str, StageResult] = field(default_factory=dict)


def run_stages(recipe: Recipe, until: StageName = "evaluate", team: Team = ALONE) -> RunResult:
    """Run every stage up to `until`, skipping what is done.

    Of several processes the first does all of it, and the others come to its help in training. Raises a
    `FireflyError` for anything the user can mend; what was finished before stays.
    """
    team.same(
        "start",
        {"firefly": firefly.__version__, "torch": version("torch"), **_options(recipe)},
        "start every process with the same recipe and overrides",
        recipe.parallel.start_timeout_s,
    )
    if team.rank:
        return _help(recipe, team)
    if until == "evaluate" and recipe.data.validation_fraction == 0:
        raise RecipeError(
            "data.validation_fraction = 0 holds nothing out, so there would be nothing to evaluate; "
            "set it above 0, or stop after training with `firefly train`."
        )
    trains = until in ("train", "evaluate")
    if trains:
        require_layout(recipe, team.world_size)
        require_reporters(recipe.train.report_to)
    base = resolve(recipe.model.base)
    check_model(base)
    if trains:
        require_method(recipe.train.method)
    if trains and recipe.parallel.tp > 1:
        require_divisible(empty_model(read_config(base), recipe.train), recipe.parallel.tp)
    _claim(recipe.out)
    with exclusive(recipe.out, "a Firefly run"):
        _refuse_another_recipe(recipe)
        team.log_to(recipe.out / "run" / "logs", aloud=True)
        team.say("begin")
        write_atomic(recipe.out / "recipe.toml", recipe.to_toml())
        line = _Line(recipe, team)
        for name in STAGES[: STAGES.index(until) + 1]:
            if name == "prune" and recipe.prune is None:
                continue
            getattr(line, name)(base)
    return RunResult(recipe.name, str(recipe.out), line.done)


def _help(recipe: Recipe, team: Team) -> RunResult:
    """What a process does that is not the first: wait for the stages before training, and train."""
    team.hear()  # the output directory is ours
    team.log_to(recipe.out / "run" / "logs", recipe.parallel.log_all_ranks)
    if team.hear() == "train":
        _Line(recipe, team).train_now()
    return RunResult(recipe.name, str(recipe.out))


def _claim(out: Path) -> None:
    """Make `out` a run's output directory; raises `OutputError` for a folder that holds something else."""
    mine = out / ".stages"
    if out.is_dir() and not mine.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        raise OutputError(
            f"{out} holds other files, which stages named dataset, model or run could replace; "
            "choose a new or empty output_dir."
        )
    with writing_to(out):
        mine.mkdir(parents=True, exist_ok=True)


def _refuse_another_recipe(recipe: Recipe) -> None:
    """A run with checkpoints goes on with the recipe it began with, and never mixes two."""
    frozen = recipe.out / "run" / "recipe.toml"
    if not frozen.is_file() or not find_checkpoints(frozen.parent):
        return
    before, now = (_what_counts(one) for one in (Recipe.load(frozen), recipe))
    changed = [
        f"{name} ({before.get(name)} → {now.get(name)})" for name in now if now[name] != before.get(name)
    ]
    changed += [f"{name} ({before[name]} → none)" for name in before if name not in now]
    if changed:
        raise CheckpointError(
            f"{frozen.parent} holds checkpoints of a run with another recipe, which differs in {', '.join(changed)}; "
            "choose another output_dir, undo the change, or delete that run."
        )


def _options(recipe: Recipe, sections: set[str] | None = None) -> dict[str, Any]:
    """Every option of some sections, or of all, by its full name."""
    tables = recipe.model_dump(mode="json", include=sections, exclude_none=True)
    return {
        f"{section}.{key}": value
        for section, table in tables.items()
        for key, value in (table.items() if isinstance(table, dict) else [("", table)])
    }


def _what_counts(recipe: Recipe) -> dict[str, Any]:
    """The options that decide about the trained weights, by their full names."""
    options = _options(recipe, {"model", "prune", "data", "train"})
    harmless = {f"train.{name}" for name in HARMLESS} | {f"data.{name}" for name in _HARMLESS_DATA}
    return {name: value for name, value in options.items() if name not in harmless}


class _Line:
    """The stages of one recipe, in order; each one's fingerprint covers those before it."""

    def __init__(self, recipe: Recipe, team: Team) -> None:
        self.recipe, self.out, self.team = recipe, recipe.out, team
        self.done: dict[str, StageResult] = {}
        self.marks: dict[str, str] = {}

    @property
    def model(self) -> Path:
        """The model that is trained: the pruned base, or the base as it is."""
        return self.out / "pruned" if self.recipe.prune else resolve(self.recipe.model.base)

    def dataset(self, base: Path) -> None:
        data = self.recipe.data
        read = [path for source in data.sources for path in files_of(locate(source.path))]
        exams = [path for given in data.decontaminate for path in files_of(Path(given))]
        files = [_identity(path) for path in (*read, *exams)]
        choices = data.model_dump(exclude=_OF_TOKENS | _HARMLESS_DATA | {"pack_length"})
        place = self.out / "dataset"
        tasks = task_files_mark([source.task for source in data.sources if source.task])

        def work() -> Any:
            open_format(
                data.chat_format, ModelTokenizer.load(base)
            )  # or the tokens stage would fail, hours later
            return build_dataset(data, place)

        self._stage("dataset", place, [choices, files, tasks], work)

    def prune(self, base: Path) -> None:
        section = self.recipe.prune
        assert section is not None
        keep_file = Path(section.keep_file) if section.keep_file else None
        corpus = [Path(path) for path in section.corpus]
        if not corpus:
            corpus = [self.out / "dataset" / f"{split}.jsonl" for split in ("train", "validation")]
        depends = [
            section.model_dump(),
            [_identity(path) for path in _files_of(base)],
            [_identity(path) for path in corpus] if section.corpus else self.marks["dataset"],
            _identity(keep_file) if keep_file else None,
        ]

        def work() -> Any:
            return prune_model(
                base,
                self.out / "pruned",
                vocab_size=section.vocab_size,
                corpus=[path for path in corpus if path.stat().st_size] if not section.corpus else corpus,
                pad_to_multiple=section.pad_to_multiple,
                keep_file=keep_file,
                engine=self.recipe.data.engine,
            )

        self._stage("prune", self.out / "pruned", depends, work)

    def tokens(self, base: Path) -> None:
        data = self.recipe.data
        depends = [
            data.model_dump(include=_OF_TOKENS),
            self.marks["dataset"],
            self.marks.get("prune"),
            sha256_file(base / "tokenizer.json"),
        ]
        place = self.out / "tokens"
        self._stage(
            "tokens", place, depends, lambda: encode_dataset(self.out / "dataset", self.model, data, place)
        )

    def train(self, base: Path) -> None:
        section = self.recipe.train.model_dump()
        depends = [
            section,
            self.recipe.data.pack_length,
            self.marks["tokens"],
            self.marks.get("prune") or [_identity(p) for p in _files_of(base)],
        ]
        self._stage("train", self.out / "model", depends, self.train_now)
        if self.done["train"].skipped:
            self.team.say("done")

    def train_now(self) -> TrainResult:
        """The training itself, which every process does together with the others."""
        if self.team.rank == 0:
            self.team.say("train")
        return train(
            self.recipe, self.model, self.out / "tokens", self.out / "run", self.out / "model", self.team
        )

    def evaluate(self, base: Path) -> None:
        recipe, place = self.recipe, self.out / "evaluation"
        depends = [recipe.evaluate.model_dump(), recipe.generation.model_dump(), self.marks["train"]]
        pruned = {"pruned": self.model} if recipe.prune else {}
        models = {"base": base, **pruned, "tuned": self.out / "model"}

        def work() -> Any:
            return evaluate(models, read_questions(self.out / "dataset"), Settings.of(recipe), place)

        self._stage("evaluate", place, depends, work)

    def _stage(self, name: StageName, place: Path, depends: Any, work: Callable[[], Any]) -> None:
        mark = sha256_json([name, firefly.__version__, depends])
        self.marks[name] = mark
        stamp = self.out / ".stages" / f"{name}.json"
        stored = _read_stamp(stamp)
        if place.is_dir() and stored.get("fingerprint") == mark:
            say(f"{name}: done before, skipped")
            self.done[name] = StageResult(stored["result"], stored["wall_s"], True)
            return
        if stored and name in _BEFORE_TRAINING and find_checkpoints(self.out / "run"):
            raise CheckpointError(
                f"What the stage {name} reads (sources, base model, corpus or the recipe) has changed since "
                f"{self.out / 'run'} got its checkpoints, and going on would mix two runs. Undo the change, choose "
                f"another output_dir, or delete {self.out / 'run'} to train anew."
            )
        if stored:
            say(f"{name}: the recipe or what it depends on changed, doing it again")
        stamp.unlink(missing_ok=True)
        started_s = time.monotonic()
        made = work()
        assert is_dataclass(made) and not isinstance(made, type)
        result = asdict(made)
        wall_s = round(time.monotonic() - started_s, 2)
        write_json(stamp, {"fingerprint": mark, "result": result, "wall_s": wall_s})
        self.done[name] = StageResult(result, wall_s, False)


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _identity(path: Path) -> list[Any]:
    """What tells one version of an input from another without reading all of it: names, sizes, times."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(item), item.stat()) for item in paths if item.is_file()]
    return [str(path), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _files_of(model: Path) -> list[Path]:
    return [*weight_files(model), model / "config.json", model / "tokenizer.json"]
