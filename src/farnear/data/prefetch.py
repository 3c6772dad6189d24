"""Fetches the shards that training reads next, while it reads the present ones.

The order is known: it follows from the plan. A thread goes through it ahead of a cursor that the training loop moves,
and asks the shard cache for each shard. It stays within a number of shards, and within the cache's byte budget, so
that what it fetches never drives out what the loop is about to read.

A shard that cannot be fetched is no reason to end a run that may be stopped before it gets there. The error is kept,
the thread goes on with the next shard, and the reader meets the error itself when it opens this one.
"""

import threading
from collections import deque
from collections.abc import Iterable

from farnear.data.remote import RemoteFacts
from farnear.data.shard_cache import NoLongerWantedError, ShardCache


class Prefetcher:
    """A thread that keeps the shards ahead of a cursor in ``cache``.

    It is a daemon: a process that ends does not wait for it. Positions count the items of ``shards`` from 0.

    Args:
        cache: Where the shards are put.
        shards: (url, facts) in the order in which they are read; a shard may come again.
        ahead: How many items beyond the cursor's own are fetched before the cursor moves on.
    """

    def __init__(self, cache: ShardCache, shards: Iterable[tuple[str, RemoteFacts]], ahead: int) -> None:
        self.errors: list[tuple[str, Exception]] = []  # (url, what was raised), in the order of time
        self._cache = cache
        self._shards = shards
        self._ahead = ahead
        self._cursor = 0
        self._closed = False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="farnear-prefetch", daemon=True)
        self._thread.start()

    def advance(self, position: int) -> None:
        """Tell that the shard at ``position`` is being read, and none before it will be. Going back is ignored."""
        with self._moved:
            self._cursor = max(self._cursor, position)
            self._moved.notify_all()

    def close(self, seconds: float = 10.0) -> None:
        """Give up the running download and wait for the thread; a network call that hangs is left behind after
        ``seconds``, as its thread ends with it or with the process."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        self._thread.join(seconds)

    def _run(self) -> None:
        window: deque[tuple[int, str, int]] = deque()  # (position, url, bytes) from the cursor on
        try:
            for position, (url, facts) in enumerate(self._shards):
                if not self._may_fetch(position, url, facts.size, window):
                    if self._closed:
                        return
                    continue
                window.append((position, url, facts.size))
                try:
                    self._cache.fetch(url, facts, wanted=lambda: not self._closed)
                except NoLongerWantedError:
                    return
                except Exception as error:
                    self.errors.append((url, error))
        except Exception as error:  # of the iterable
            self.errors.append(("", error))

    def _may_fetch(self, position: int, url: str, size: int, window: "deque[tuple[int, str, int]]") -> bool:
        """Wait until there is room in the window; False when the cursor has passed ``position``, or when closed."""
        budget = self._cache.byte_budget
        with self._moved:
            while not self._closed and position >= self._cursor:
                while window and window[0][0] < self._cursor:
                    window.popleft()
                total = sum({**{old: old_size for _, old, old_size in window}, url: size}.values())
                if position <= self._cursor + self._ahead and (budget is None or not window or total <= budget):
                    return True
                self._moved.wait()
        return False
