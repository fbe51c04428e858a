"""The recipe: one TOML file describes a whole run. This schema is the only place where an option is defined.

Each field carries its default, its allowed range and its help. `Recipe.load` reads a file, applies
`section.key=value` overrides, and reports *all* mistakes together, each with field, value, allowed range,
cure and nearest key. Keys keep the ecosystem's names. No torch here: reading a recipe is instant.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from firefly.errors import RecipeError

Kind = Literal["sft", "pretrain", "dpo"]
Method = Literal["full", "lora", "dora", "qlora"]
Engine = Literal["local", "ray"]


class Section(BaseModel):
    """One table of the recipe: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    base: str = Field(
        min_length=1,
        description="a model directory in Hugging Face layout, a hub name, or 'demo:base', the embedded base",
    )


class PruneSection(Section):
    """Which tokens the pruned vocabulary keeps. Leave the table out to train the base as it is."""

    corpus: list[str] = Field(
        default=[], description="text files or folders to count tokens in; empty: the recipe's own data"
    )
    vocab_size: Annotated[int, Field(gt=0)] = Field(description="exact size of the pruned vocabulary")
    pad_to_multiple: Annotated[int, Field(ge=1)] = Field(
        default=1, description="keep a few more tokens so that vocab_size is a multiple of this"
    )
    keep_file: str | None = Field(
        default=None, description="a text file of further tokens to keep, one a line"
    )


class Source(Section):
    """One source of training data."""

    path: str = Field(
        description="a file, a folder or a pattern such as 'couplets/*.jsonl.zst'; relative paths start at data.root, "
        "else at the recipe's folder; 'demo:NAME' is embedded"
    )
    importer: str = Field(default="auto", description="how to read it; 'auto' looks at the first record")
    task: str | None = Field(default=None, description="the task that renders raw records, e.g. Couplet")
    fields: dict[str, str] = Field(
        default={}, description="where the task's fields have other names here: {first = 'upper'}"
    )
    directions: list[str] = Field(
        default=[],
        description="of the task's directions only these, e.g. ['first_to_second']; empty: all",
    )
    cap: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="at most this many records, chosen by hash"
    )
    repeat: Annotated[int, Field(ge=1)] = Field(
        default=1, description="render each record with this many different templates"
    )
    licence: str | None = Field(default=None, description="the licence, for the dataset's card")


class CleanSection(Section):
    """What an example must be like to stay, and what is mended in it. Every drop has a reason and is counted."""

    min_target_characters: Annotated[int, Field(ge=1)] = Field(
        default=1, description="shorter answers are dropped"
    )
    max_characters: Annotated[int, Field(ge=1)] = Field(
        default=200_000, description="longer examples are dropped"
    )
    max_repetition: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="drop an answer of which a larger share is repetition"
    )
    min_language_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="share of letters that must be in the languages below; 0 lets everything pass",
    )
    languages: list[Literal["zh", "en"]] = Field(
        default=["zh", "en"], description="the languages meant by min_language_share"
    )
    html: Literal["strip", "drop", "keep"] = Field(
        default="strip", description="what to do with tags and entities that a crawler left"
    )
    mojibake: Literal["drop", "keep"] = Field(
        default="drop", description="what to do with text that was decoded in a wrong way"
    )
    simplify: bool = Field(
        default=False, description="turn traditional characters into simplified ones (OpenCC)"
    )
    half_width: bool = Field(
        default=False, description="turn full-width letters and digits into half-width ones"
    )


class MixSection(Section):
    """How much of each task goes in. Everything is decided by hashes: the same recipe gives the same bytes."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="kind → how often its records are used, on average; the task's own weight otherwise",
    )
    caps: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={}, description="kind → records at most; the task's own cap otherwise"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="above 1, small tasks are repeated and large ones thinned: shares go with count^(1/temperature)",
    )
    epochs: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="use everything so many times, each time with another template"
    )


class DataSection(Section):
    """What the model learns from, and how it becomes tokens."""

    root: str | None = Field(default=None, description="the folder where relative source paths start")
    sources: list[Source] = Field(min_length=1, description="the sources; on a tie the earlier one wins")
    on_bad_record: Literal["stop", "skip"] = Field(
        default="stop",
        description="a line that is no record: stop with its place, or put it among the rejects and go on",
    )
    clean: CleanSection = CleanSection()
    deduplicate: Literal["off", "exact", "near"] = Field(
        default="exact", description="drop repetitions: the same text, or also nearly the same (MinHash)"
    )
    near_threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8, description="how alike two texts must be (Jaccard of character 5-grams) to count as one"
    )
    decontaminate: list[str] = Field(
        default=[],
        description="evaluation files; examples that share an n-gram with them are dropped and listed",
    )
    decontaminate_ngram: Annotated[int, Field(ge=5)] = Field(
        default=20, description="characters in that n-gram, white space and punctuation left out"
    )
    mix: MixSection = MixSection()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.02, description="share of the examples held out, chosen by content hash"
    )
    chat_format: Literal["firefly", "chatml", "llama2", "llama3", "gemma", "mistral", "baichuan", "model"] = (
        Field(
            default="firefly",
            description="how turns become tokens; 'model': the base's own chat_template",
        )
    )
    max_seq_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        default=512, description="tokens in one sample at most"
    )
    overlong: Literal["middle-of-input", "left-of-input", "right-of-target", "drop", "error"] = Field(
        default="middle-of-input",
        description="what gives way in a longer sample; every cut is counted and shown",
    )
    allow_lost_targets: bool = Field(
        default=False,
        description="drop samples whose target would be cut entirely, instead of stopping with an error",
    )
    pack_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = Field(
        default=None,
        description="pack samples into rows of this many tokens, and let a batch count rows; otherwise it counts "
        "samples",
    )
    engine: Engine = Field(
        default="local", description="where the work runs: processes here, or a Ray cluster"
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="processes; 0: one a core. The result is the same for any number"
    )


class TrainSection(Section):
    """How it is trained. A batch counts samples, so packing changes the layout and never the mathematics."""

    objective: Kind = Field(
        default="sft",
        description="sft: loss on targets alone; pretrain: on every token; dpo: prefer the chosen answer of a pair to "
        "the rejected one (a batch counts pairs)",
    )
    method: Method = Field(
        default="full",
        description="full: every parameter learns; lora, dora: adapters on a frozen base; qlora: the same on a base in "
        "4 bits (NF4)",
    )
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = Field(default=16, description="samples a step")
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = Field(
        default=1, description="micro-batches added up before an optimizer step"
    )
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="optimizer steps in total"
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="passes over the data when max_steps is not given"
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(default=3e-5, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="shape after warm-up"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=3000, description="steps of linear warm-up")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="where cosine and linear end, as a share of learning_rate"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW, on matrices only")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="clip the global norm to this"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto",
        description="arithmetic; weights stay float32. auto: bf16 on CUDA, float32 on CPU",
    )
    gradient_checkpointing: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="recompute layers in the backward pass for less memory: 0 or false: none, "
        "1 or true: each (a third more time), n: every n-th",
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(default=42, description="order of the samples")
    logging_steps: Annotated[int, Field(ge=1)] = Field(default=10, description="steps between log lines")
    eval_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="steps between validations; always one at the end"
    )
    save_steps: Annotated[int, Field(ge=1)] = Field(default=500, description="steps between checkpoints")
    save_total_limit: Annotated[int, Field(ge=1)] = Field(default=2, description="checkpoints kept")
    resume_from_checkpoint: Literal["auto", "never"] = Field(
        default="auto", description="auto: go on from the newest checkpoint of this run"
    )
    report_to: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(
        default=["tensorboard"],
        description="who hears of the figures besides metrics.jsonl; wandb and swanlab must be installed",
    )
    check: bool = Field(
        default=True,
        description="before training, refuse what memory or disk cannot hold, and try the largest batch",
    )
    compile: bool = Field(default=False, description="fuse the layers' small operations with torch.compile")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit: moments take 2 bytes a parameter, not 8"
    )
    weights: Literal["float32", "bf16_stochastic", "bf16_kahan"] = Field(
        default="float32",
        description="how weights are kept: bf16 halves them and their gradients; updates are rounded "
        "stochastically, or exactly with Kahan's compensation (2 more bytes)",
    )
    lora_rank: Annotated[int, Field(ge=1)] = Field(default=16, description="rank of an adapter's update")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        default=32.0, description="an adapter's update is scaled by lora_alpha / lora_rank"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="dropout on what an adapter reads, token by token"
    )
    lora_target_modules: list[str] = Field(
        default=[],
        description="linear layers that get an adapter, by the end of their names; empty: all but the head",
    )
    dpo_beta: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="how strongly dpo holds the model to its base: higher is closer"
    )

    @field_validator("weights")
    @classmethod
    def _fits_precision(cls, weights: str, info: ValidationInfo) -> str:
        if weights != "float32" and info.data.get("method") != "full":
            raise ValueError("'float32' unless method is 'full': adapters are small, and learn in float32")
        if weights != "float32" and info.data.get("precision") == "float32":
            raise ValueError("'float32' where precision is 'float32'")
        return weights


class ParallelSection(Section):
    """How several GPUs share the work; data parallelism takes what `tp` leaves."""

    zero: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="what is sharded over the data-parallel ranks: 1: optimizer states, 2: also gradients, "
        "3: also weights; 0: nothing",
    )
    tp: Annotated[int, Field(ge=1)] = Field(
        default=1, description="tensor parallelism: GPUs that share every matrix; must divide the heads"
    )
    hsdp: Annotated[int, Field(ge=1)] = Field(
        default=1, description="replicas of the sharding group, such as one a node"
    )
    offload: Literal["none", "optimizer", "all", "auto"] = Field(
        default="none",
        description="what lies in main memory: optimizer states, or also weights and gradients; auto: what must",
    )
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="seconds until every process must have come"
    )
    hang_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=600.0, description="seconds without any progress in training or validation that end the run"
    )
    log_all_ranks: bool = Field(
        default=False, description="show the messages of every process, not only those of the first"
    )


class GenerationSection(Section):
    """Sampling, for chat and evaluation; the defaults are the article's."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 200
    do_sample: bool = True
    temperature: Annotated[float, Field(gt=0)] = 0.35
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.85
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.2
    penalize_prompt: bool = Field(
        default=True,
        description="whether a token of the prompt counts as repeated, as in transformers; false where answers take "
        "up words of the question",
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42


class EvaluateSection(Section):
    """What is measured before and after training."""

    generations_per_kind: Annotated[int, Field(ge=0)] = Field(
        default=16, description="held-out prompts answered per task"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(default=32, description="prompts answered at once")
    precision: Literal["float32", "bf16"] = Field(
        default="float32",
        description="weights and arithmetic. In bf16, half the memory, a close call between two tokens may turn with "
        "the batch",
    )


class Recipe(Section):
    """A whole run: model → prune → data → train → evaluate."""

    name: str = Field(min_length=1, description="the run's name")
    output_dir: str = Field(
        min_length=1, description="where every result goes; relative to the current folder"
    )
    model: ModelSection
    prune: PruneSection | None = None
    data: DataSection
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    generation: GenerationSection = GenerationSection()
    evaluate: EvaluateSection = EvaluateSection()

    @property
    def out(self) -> Path:
        """The output directory as a path."""
        return Path(self.output_dir)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML recipe and apply overrides such as `train.learning_rate=2e-5`.

        Relative source, corpus and base paths are looked for beside the recipe, then in the current folder.
        Raises `RecipeError` with every mistake at once.
        """
        path = Path(path)
        if path.is_dir():
            raise RecipeError(f"{path} is a directory; name the recipe's TOML file in it.")
        if not path.is_file():
            raise RecipeError(
                f"The recipe {path} does not exist; recipes are TOML files, see the folder recipes/."
            )
        try:
            text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
            table = tomllib.loads(text)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path} is not valid TOML: {error}.") from error
        if not table:
            raise RecipeError(f"The recipe {path} is empty; start from one in the folder recipes/.")
        for override in overrides:
            _apply(table, override)
        _anchor_paths(table, path.parent)
        return cls.from_table(table, str(path))

    @classmethod
    def from_table(
        cls, table: dict[str, Any], origin: str = "the recipe", overrides: Sequence[str] = ()
    ) -> Recipe:
        """Validate a table of recipe values, with overrides; raises `RecipeError` with every mistake at once."""
        for override in overrides:
            _apply(table, override)
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            lines = [_sentence(detail) for detail in error.errors()]
            head = f"{origin}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}"
            raise RecipeError("\n  ".join([head, *lines])) from error

    def to_toml(self) -> str:
        """The recipe with every default written out, as TOML that `load` reads back to an equal recipe."""
        return tomli_w.dumps(self.model_dump(exclude_none=True), multiline_strings=False)


def _apply(table: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the raw table; the value is read as TOML, else taken as text."""
    name, equals, raw = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"The override '{override}' is not of the form section.key=value, e.g. train.learning_rate=2e-5."
        )
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    place = table
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise RecipeError(
                f"The override '{override}' goes through '{key}', which is a value, not a table."
            )
    place[keys[-1]] = value


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    """Make input paths absolute, so that the recipe, frozen beside its results, means the same from anywhere."""

    def anchored(value: Any) -> Any:
        if not isinstance(value, str) or value.startswith("demo:") or Path(value).is_absolute():
            return value
        for place in (folder / value, Path(value)) if value else ():
            if place.exists() or any(place.parent.glob(place.name)):  # sources may be patterns
                return str(place.absolute())
        return value

    model, prune, data = (table.get(section) for section in ("model", "prune", "data"))
    if isinstance(model, dict) and "base" in model:
        model["base"] = anchored(model["base"])
    if isinstance(prune, dict):
        if isinstance(prune.get("corpus"), list):
            prune["corpus"] = [anchored(item) for item in prune["corpus"]]
        if "keep_file" in prune:
            prune["keep_file"] = anchored(prune["keep_file"])
    if isinstance(data, dict):
        if isinstance(data.get("root"), str):
            data["root"] = anchored(data["root"])
            folder = Path(data["root"])
        if isinstance(data.get("decontaminate"), list):
            data["decontaminate"] = [anchored(item) for item in data["decontaminate"]]
        for source in data["sources"] if isinstance(data.get("sources"), list) else []:
            if isinstance(source, dict) and "path" in source:
                source["path"] = anchored(source["path"])


def _sentence(detail: Any) -> str:
    """One pydantic error as one sentence: field, value, allowed range, cure, nearest key."""
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    name = ".".join(str(part) for part in location)
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{name} = {value!r}: unknown key; {hint}"
    if kind == "missing":
        return f"{name}: missing; {_help_at(location) or 'add it'}"
    if kind == "literal_error":
        expected = context["expected"].replace(" or ", ", ")
        near = difflib.get_close_matches(str(value), [part.strip(" '") for part in expected.split(",")], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{name} = {value!r}: allowed: {expected}{hint}"
    bounds = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"{name} = {value!r}: must be {bounds[kind]} {limit}; {_help_at(location) or 'change it'}"
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} = {value!r}: should be {message}; {_help_at(location) or 'change it'}"


def _section_at(location: Sequence[Any]) -> type[Section] | None:
    """The schema class that lies at a location such as ('data', 'sources', 0)."""
    here: type[Section] = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part)
        if field is None:
            return None
        options = [field.annotation, *get_args(field.annotation)]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        if not inner:
            return None
        here = inner[0]
    return here


def _fields_at(location: Sequence[Any]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section else []


def _help_at(location: Sequence[Any]) -> str | None:
    section = _section_at(location[:-1])
    field = section.model_fields.get(str(location[-1])) if section else None
    return field.description if field else None
