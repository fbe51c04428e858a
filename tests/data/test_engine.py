"""One ordered map: the same results in the same order from one process, from several, and from a Ray cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from firefly.data.engine import ordered_map
from firefly.errors import InputError


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
