"""Runs a function over many items in several processes, results in the order of the items.

`ProcessPoolExecutor.map` takes all items at once and keeps every result that nobody has asked for yet. Here only a few
items are ever under way, so that pages stream from the renderer into a shard, however many there are.

Processes are spawned, not forked: a parent with PyTorch in it has threads, and a fork then copies locked locks.

Threads do where the work is waiting for a server, or decoding, during which Pillow lets other threads run.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from farnear.processes import end_with_starter, main_module_hidden

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_UNDER_WAY_PER_WORKER = 3
THREADS = 8


def processes_for(items: int, *, items_worth_a_process: int) -> int:
    """How many processes `items` deserve: 1 when starting more would take longer than the work, at most one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, items // items_worth_a_process))


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; an exception in a process is raised here.

    Args:
        function: something that can be pickled: a function of a module, but not of the program's main one, or a
            `functools.partial` of it.
        items: picklable, read lazily, a few ahead of what is asked for.
        processes: with 1 everything happens in this process.
    """
    if processes == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=end_with_starter) as executor:
        yield from _in_order(function, items, executor, ITEMS_UNDER_WAY_PER_WORKER * processes)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, worked out in a few threads; items are read a few ahead."""
    with ThreadPoolExecutor(THREADS) as executor:
        yield from _in_order(function, items, executor, ITEMS_UNDER_WAY_PER_WORKER * THREADS)


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], executor: Executor, at_once: int
) -> Iterator[Result]:
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            with main_module_hidden():  # the first item starts the processes
                under_way.append(executor.submit(function, item))
            if len(under_way) == at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:  # after an error nobody wants the rest
            future.cancel()


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut `items` into lists of `size`, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
