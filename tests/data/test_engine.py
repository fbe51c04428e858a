"""One ordered map: the same results in the same order from one process, from several, and from a Ray cluster."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firefly.data import dataset as dataset_module
from firefly.data import engine as engine_module
from firefly.data import tokens as tokens_module
from firefly.data.dataset import build_dataset
from firefly.data.engine import ordered_map
from firefly.data.tokens import encode_dataset
from firefly.errors import InputError
from firefly.prune import counting
from firefly.prune.prune import prune_model
from firefly.recipe import DataSection, Engine
from tiny import write_pairs


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.03 if number == 0 else 0)  # the first ends last
    return number * number, os.getpid()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise InputError("three is bad; leave it out.")
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order(num_workers: int) -> None:
    found = list(ordered_map(slow_square, range(9), num_workers=num_workers))
    assert [square for square, _ in found] == [number * number for number in range(9)]
    assert (os.getpid() in {pid for _, pid in found}) == (num_workers == 1)


def test_one_block_needs_no_process() -> None:
    assert list(ordered_map(slow_square, [5], num_workers=2)) == [(25, os.getpid())]
    assert list(ordered_map(slow_square, [], num_workers=2)) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_arrives_at_its_place_and_as_itself(num_workers: int) -> None:
    results = ordered_map(fail_at_three, range(9), num_workers=num_workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="three is bad"):
        next(results)


def test_only_a_few_blocks_are_on_their_way() -> None:
    taken = []

    def blocks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = ordered_map(fail_at_three, blocks(), num_workers=2)
    next(results)
    assert len(taken) < 10
    results.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    paths = os.pathsep.join(
        [str(Path(__file__).parent), *sys.path]
    )  # the workers look for this file's functions
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_ray_cluster_does_the_same() -> None:
    found = list(ordered_map(slow_square, range(9), engine="ray"))
    assert [square for square, _ in found] == [number * number for number in range(9)]
    assert os.getpid() not in {pid for _, pid in found}
    results = ordered_map(fail_at_three, range(9), engine="ray")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="three is bad"):
        next(results)


@pytest.mark.usefixtures("cluster")
def test_a_corpus_counted_on_ray_prunes_to_the_same_bytes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting.batches, "__defaults__", (1000,))  # characters; many batches
    source = write_pairs(tmp_path / "pairs.jsonl", 120)
    sent: list[int] = []
    on_ray = engine_module._on_ray
    monkeypatch.setattr(engine_module, "_on_ray", lambda *work: sent.append(1) or on_ray(*work))
    engines: tuple[Engine, ...] = ("local", "ray")
    for engine in engines:
        prune_model(tiny("bloom"), tmp_path / engine, corpus=[source], vocab_size=470, engine=engine)
    assert sent == [1]
    assert files_in(tmp_path / "local") == files_in(tmp_path / "ray")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("cluster")
def test_a_dataset_and_its_tokens_made_on_ray_have_the_same_bytes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleaning, near repetitions, overlaps with an evaluation file, the mix, encoding: block by block over there."""
    monkeypatch.setattr(dataset_module, "_RECORDS_AT_ONCE", 20)  # many blocks
    monkeypatch.setattr(tokens_module, "_BLOCK_BYTES", 2000)
    source = write_pairs(tmp_path / "pairs.jsonl", 120)
    lines = source.read_text("utf-8").splitlines()
    hidden = json.loads(lines[5])["target"] + "，这一句只在考卷里才有"
    lines += [lines[3], '{"kind": ', json.dumps({"kind": "K", "input": "考题", "target": hidden})]
    source.write_text("\n".join(lines) + "\n", "utf-8")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"answer": hidden}), "utf-8")
    made = {}
    for engine in ("local", "ray"):
        data = DataSection.model_validate(
            {
                "sources": [{"path": str(source)}],
                "on_bad_record": "skip",
                "deduplicate": "near",
                "decontaminate": [str(tmp_path / "exam.jsonl")],
                "decontaminate_ngram": 12,
                "mix": {"epochs": 1.5},
                "validation_fraction": 0.2,
                "engine": engine,
                "num_workers": 2 if engine == "ray" else 1,
            }
        )
        place = tmp_path / engine
        result = build_dataset(data, place / "dataset")
        encode_dataset(place / "dataset", tiny("bloom"), data, place / "tokens")
        made[engine] = files_in(place)
        assert {"bad_record", "duplicate", "contaminated"} <= set(result.reasons)
    assert made["local"].keys() == made["ray"].keys() and len(made["ray"]) > 15
    assert [name for name in made["ray"] if made["ray"][name] != made["local"][name]] == []
