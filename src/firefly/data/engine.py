"""Where the data stages work: one ordered map over blocks of records, in processes here or on a Ray cluster.

    for result in ordered_map(function, blocks, engine="local", num_workers=2): …

Results come in the order of the blocks whatever the number of workers, and only a few blocks are on their way at
once, so memory is bounded and the same input gives the same output everywhere. `function` and its blocks must
pickle; what a function needs again and again (a tokenizer) it loads once a process with `functools.cache`. Processes
stay for the next map, so the key of such a cache says which version of a file is meant.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

from firefly.errors import InputError

Block = TypeVar("Block")
Result = TypeVar("Result")
_ON_THE_WAY = 2  # blocks a worker: one in work, one waiting
_IDLE_S = 10  # after which workers end
_WORKER = {
    "TOKENIZERS_PARALLELISM": "false",  # every core has a worker already
    "OMP_NUM_THREADS": "1",
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e12",  # bytes; a tokenizer that is loaded late is no leak
}


def ordered_map(
    function: Callable[[Block], Result],
    blocks: Iterable[Block],
    *,
    engine: str = "local",
    num_workers: int = 0,
) -> Iterator[Result]:
    """Yield `function(block)` for every block, in order.

    `num_workers` 0 means one a core (on Ray: one a CPU of the cluster); 1 works in this process.
    Raises what `function` raises, at the place of its block.
    """
    stream = iter(blocks)
    first = list(islice(stream, 2))
    blocks = chain(first, stream)
    if engine == "ray":
        yield from _on_ray(function, blocks, num_workers)
    elif (num_workers or available_cores()) == 1 or len(
        first
    ) < 2:  # a small job is done before a process starts
        yield from map(function, blocks)
    else:
        yield from _in_processes(function, blocks, num_workers or available_cores())


def call_everywhere(function: Callable[[], Result], *, engine: str = "local", num_workers: int = 0) -> Result:
    """Call `function` in each process of the next `ordered_map`, which makes it ready; returns the first's result."""
    workers = num_workers or available_cores()
    if engine == "ray" or workers == 1:
        return function()
    executor = _executor(workers)
    first, *_ = [executor.submit(function) for _ in range(workers)]
    found: Result = first.result()
    return found


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    function: Callable[[Block], Result], blocks: Iterable[Block], num_workers: int
) -> Iterator[Result]:
    executor = _executor(num_workers)
    try:
        yield from _window(lambda block: executor.submit(function, block), _result, blocks, num_workers)
    except BaseException:
        executor.shutdown(kill_workers=True)
        raise


def _executor(num_workers: int) -> Any:
    """The worker processes, which stay for the next map and end when none comes for a while."""
    # loky: workers do not inherit threads, and do not import the caller's script as `spawn` would.
    from loky import get_reusable_executor

    return get_reusable_executor(max_workers=num_workers, timeout=_IDLE_S, env=_WORKER)


def _result(future: Any) -> Any:
    return future.result()


def _on_ray(
    function: Callable[[Block], Result], blocks: Iterable[Block], num_workers: int
) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "data.engine = 'ray' needs Ray, which is not installed; run `pip install firefly-zh[ray]`."
        ) from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        # Joins the cluster that RAY_ADDRESS names, if any.
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")

    def work(block: Block) -> Result:  # Ray refuses a `partial`
        os.environ.update(_WORKER)
        return function(block)

    remote = ray.remote(work)

    most = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def fetch(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    yield from _window(remote.remote, fetch, blocks, most)


def _window(
    submit: Callable[[Block], Any], fetch: Callable[[Any], Result], blocks: Iterable[Block], num_workers: int
) -> Iterator[Result]:
    """Keep a few blocks on their way, and hand results out in order."""
    pending: deque[Any] = deque()
    for block in blocks:
        pending.append(submit(block))
        if len(pending) > _ON_THE_WAY * num_workers:
            yield fetch(pending.popleft())
    while pending:
        yield fetch(pending.popleft())
