"""The prefetcher: it keeps its distance to the cursor, stays within the budget, and outlives what fails."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_stores import Fault, ObjectServer, object_server

from farnear.data.prefetch import Prefetcher
from farnear.data.remote import Patience, RemoteFacts, remote_facts
from farnear.data.shard_cache import ShardCache
from farnear.errors import UserError

QUICK = Patience(attempts=2, seconds_first_wait=0.01, seconds_longest_wait=0.02, seconds_stalled=20.0)
SIZE = 10_000


@pytest.fixture
def store() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


def put_shards(store: ObjectServer, count: int) -> list[tuple[str, RemoteFacts]]:
    urls = [store.put(f"{number}.tar", random.Random(number).randbytes(SIZE)) for number in range(count)]
    return [(url, remote_facts(url, QUICK)) for url in urls]


def fetched(store: ObjectServer) -> list[str]:
    return [path.removesuffix(".tar") for method, path, _ in store.requests if method == "GET"]


def settles(what: Callable[[], Any], expected: Any) -> None:
    """Wait until ``what`` gives ``expected``, and see that it stays so."""
    end = time.monotonic() + 10
    while what() != expected and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.15)
    assert what() == expected


def test_it_follows_the_cursor(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 6)
    prefetcher = Prefetcher(ShardCache(tmp_path, None, QUICK), iter(shards), ahead=1)
    settles(lambda: fetched(store), ["0", "1"])
    prefetcher.advance(1)
    settles(lambda: fetched(store), ["0", "1", "2"])
    prefetcher.advance(4)  # 3 was passed before it was fetched
    prefetcher.advance(2)
    settles(lambda: fetched(store), ["0", "1", "2", "4", "5"])
    prefetcher.close()
    assert prefetcher.errors == []


def test_it_stays_within_the_budget(tmp_path: Path, store: ObjectServer) -> None:
    """Room for three shards, ten ahead. One that comes twice in the window counts once."""
    shards = put_shards(store, 5)
    order = [shards[number] for number in (0, 1, 0, 2, 3, 4)]
    cache = ShardCache(tmp_path, 3 * SIZE + 5, QUICK)
    prefetcher = Prefetcher(cache, order, ahead=10)
    settles(lambda: fetched(store), ["0", "1", "2"])
    prefetcher.advance(1)  # the second 0 is still to come
    settles(lambda: fetched(store), ["0", "1", "2"])
    for number in (0, 1, 2):
        cache.open(*shards[number]).close()
    prefetcher.advance(3)
    settles(lambda: fetched(store), ["0", "1", "2", "3", "4"])
    prefetcher.close()


def test_errors_are_kept_and_the_next_shard_comes(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 3)
    del store.objects["1.tar"]
    cache = ShardCache(tmp_path, None, QUICK)

    def order() -> Iterator[tuple[str, RemoteFacts]]:
        yield from shards
        raise ValueError("the plan broke")

    prefetcher = Prefetcher(cache, order(), ahead=5)
    settles(lambda: fetched(store), ["0", "1", "2"])
    prefetcher.close()
    [(url, missing), (_, broken)] = prefetcher.errors
    assert url == shards[1][0] and isinstance(missing, UserError) and "404" in str(missing)
    assert str(broken) == "the plan broke"
    with pytest.raises(UserError, match=r"1.tar cannot be read .404"):
        cache.open(*shards[1])


def test_close_gives_up_the_download(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    store.faults["0.tar"] = [Fault(stall_at=5000)]
    prefetcher = Prefetcher(ShardCache(tmp_path, None, QUICK), shards, ahead=5)
    settles(lambda: fetched(store), ["0"])
    threading.Timer(0.1, store.go_on.set).start()
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    assert fetched(store) == ["0"] and prefetcher.errors == []
    assert [path.name for path in tmp_path.iterdir()] == [".budget"]


def test_close_wakes_a_thread_that_waits(tmp_path: Path, store: ObjectServer) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path, None, QUICK), put_shards(store, 3), ahead=0)
    settles(lambda: fetched(store), ["0"])
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


PROGRAM = """
import sys, time
from pathlib import Path
from farnear.data.prefetch import Prefetcher
from farnear.data.remote import RemoteFacts
from farnear.data.shard_cache import ShardCache
prefetcher = Prefetcher(ShardCache(Path(sys.argv[1])), [(sys.argv[2], RemoteFacts(10000, ""))] * 2, ahead=1)
while not any(Path(sys.argv[1]).glob("*.part")):
    time.sleep(0.01)
time.sleep(0.3)
print("end")
"""


def test_it_keeps_no_process_alive(tmp_path: Path, store: ObjectServer) -> None:
    [(url, _)] = put_shards(store, 1)
    store.faults["0.tar"] = [Fault(stall_at=5000)]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), url], capture_output=True, text=True, timeout=20, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "end\n"), ran.stderr
