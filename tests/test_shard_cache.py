"""The shard cache under races, faults, kills and a budget: one download each, right bytes, nothing left behind."""

import hashlib
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from object_stores import Fault, ObjectServer, object_server, s3_environment, s3_server

from farnear.data import shard_cache
from farnear.data.remote import Patience, RemoteFacts, remote_facts
from farnear.data.shard_cache import NoLongerWantedError, ShardCache
from farnear.data.shard_store import OpenShards, ShardFacts, ShardStore
from farnear.errors import UserError

QUICK = Patience(attempts=3, seconds_first_wait=0.01, seconds_longest_wait=0.02, seconds_stalled=20.0)
SIZE = 200_000

Shard = tuple[str, RemoteFacts]


@pytest.fixture
def store() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


def shard_bytes(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def put_shards(store: ObjectServer, count: int) -> list[Shard]:
    urls = [store.put(f"part-{number:03d}.tar", shard_bytes(number)) for number in range(count)]
    return [(url, remote_facts(url, QUICK)) for url in urls]


def read(cache: ShardCache, shard: Shard) -> bytes:
    with cache.open(*shard) as file:
        return file.readall()


def names(folder: Path) -> list[str]:
    """Of what is in the cache, without its lock and the hashes."""
    return sorted(path.name[:12] + path.suffix * (path.suffix == ".part") for path in entries(folder))


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != ".budget"]


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_shard_is_downloaded_once_and_read_only(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    cache = ShardCache(tmp_path / "not" / "there", patience=QUICK)
    for _ in range(2):
        assert [read(cache, shard) for shard in shards] == [shard_bytes(0), shard_bytes(1)]
        cache = pickle.loads(pickle.dumps(cache))
    assert [len(store.gets(f"part-00{number}.tar")) for number in range(2)] == [1, 1]
    assert names(cache.folder) == ["part-000.tar", "part-001.tar"]
    with cache.open(*shards[0]) as file, pytest.raises(OSError):
        file.write(b"x")


def test_a_changed_object_is_another_entry(tmp_path: Path, store: ObjectServer) -> None:
    [old] = put_shards(store, 1)
    cache = ShardCache(tmp_path, patience=QUICK)
    kept = read(cache, old)
    url = store.put("part-000.tar", kept[::-1])
    assert read(cache, (url, remote_facts(url, QUICK))) == kept[::-1]
    assert read(cache, old) == kept  # of the old index
    assert len(store.gets("part-000.tar")) == 2 and len(entries(tmp_path)) == 2


def test_an_object_replaced_before_its_download(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    cache = ShardCache(tmp_path, patience=QUICK)
    store.faults["part-000.tar"] = [Fault(cut_at=1000), Fault(replace=shard_bytes(9))]
    with pytest.raises(UserError, match=r"part-000.tar was changed after it was indexed"):
        cache.open(*shards[0])
    assert entries(tmp_path) == []
    assert read(cache, shards[1]) == shard_bytes(1)


def test_short_bodies(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    cache = ShardCache(tmp_path, patience=QUICK)
    store.faults["part-000.tar"] = [Fault(cut_at=150_000), Fault(short_by=1)]
    assert read(cache, shards[0]) == shard_bytes(0)
    for fault in (Fault(cut_at=10), Fault(short_by=1), Fault(status=503)):
        store.faults["part-001.tar"] = [fault] * 3
        with pytest.raises(UserError, match=r"part-001.tar"):
            cache.fetch(*shards[1])
        assert names(tmp_path) == ["part-000.tar"]
    cache.fetch(*shards[1])
    assert read(cache, shards[1]) == shard_bytes(1)


def test_an_entry_that_was_cut_is_downloaded_again(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    cache = ShardCache(tmp_path, patience=QUICK)
    cache.fetch(*shard)
    os.truncate(entries(tmp_path)[0], 100)
    assert read(cache, shard) == shard_bytes(0)


def test_threads_download_once(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    store.faults["part-000.tar"] = [Fault(stall_at=100_000)]
    cache = ShardCache(tmp_path, patience=QUICK)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read, cache, shard) for _ in range(4)]
        wait_until(lambda: store.gets("part-000.tar"))
        time.sleep(0.1)
        store.go_on.set()
        assert [one.result(20) for one in reads] == [shard_bytes(0)] * 4
    assert len(store.gets("part-000.tar")) == 1


def test_a_waiter_tries_itself_when_the_download_fails(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    store.faults["part-000.tar"] = [Fault(status=503)] * 3
    cache = ShardCache(tmp_path, patience=QUICK)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(read, cache, shard) for _ in range(2)]
        errors = [one.exception(20) for one in reads]
    assert sorted(error is None for error in errors) == [False, True]
    assert names(tmp_path) == ["part-000.tar"]


def test_a_shard_that_came_while_its_lock_was_awaited(
    tmp_path: Path, store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [shard] = put_shards(store, 1)
    cache = ShardCache(tmp_path, patience=QUICK)
    cache.fetch(*shard)
    look, looks = shard_cache._open_entry, []

    def look_too_early(entry: Path, size: int) -> Any:
        looks.append(entry)
        return look(entry, size) if len(looks) > 1 else None

    monkeypatch.setattr(shard_cache, "_open_entry", look_too_early)
    assert read(cache, shard) == shard_bytes(0)
    assert len(store.gets("part-000.tar")) == 1 and names(tmp_path) == ["part-000.tar"]


def read_all(folder: Path, byte_budget: int | None, order: list[Shard], start: Any, results: Any) -> None:
    cache = ShardCache(folder, byte_budget, QUICK)
    start.wait(30)
    for url, facts in order:
        results.put((url, hashlib.sha256(read(cache, (url, facts))).hexdigest()))


class Racers:
    """Spawned processes that read shards through one cache."""

    def __init__(self, folder: Path, byte_budget: int | None, orders: list[list[Shard]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.expected = sum(map(len, orders))
        self.results = context.Queue()
        self.start = context.Barrier(len(orders))  # kept, for it is gone with its last reference here
        arguments = [(folder, byte_budget, order, self.start, self.results) for order in orders]
        self.processes = [context.Process(target=read_all, args=args, daemon=True) for args in arguments]
        for process in self.processes:
            process.start()

    def found(self) -> list[tuple[str, str]]:
        found = [self.results.get(timeout=30) for _ in range(self.expected)]
        for process in self.processes:
            process.join(10)
            assert process.exitcode == 0
        return found

    def __enter__(self) -> "Racers":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


def sizes(folder: Path) -> dict[str, int]:
    """Lengths of the entries and downloads. Listing a folder takes time, so it is done until twice the same comes."""

    def look() -> dict[str, int]:
        found = {}
        for path in folder.iterdir() if folder.exists() else ():
            try:
                found[path.name.removesuffix(".part")] = path.stat().st_size
            except FileNotFoundError:
                continue
        return found

    while (found := look()) != look():
        pass
    return found


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_two_processes_race_for_the_same_shards(tmp_path: Path, protocol: str) -> None:
    faults = {0: [Fault(status=503), Fault(cut_at=150_000)], 3: [Fault(cut_at=0)], 4: [Fault(status=500)]}
    with ExitStack() as stack:
        if protocol == "http":
            store = stack.enter_context(object_server())
            shards = put_shards(store, 6)
            prefix = ""
        else:
            pytest.importorskip("moto.server")
            store = stack.enter_context(s3_server())
            client = stack.enter_context(s3_environment(store.url))
            client.create_bucket(Bucket="race")
            for number in range(6):
                client.put_object(Bucket="race", Key=f"part-{number:03d}.tar", Body=shard_bytes(number))
            urls = [f"s3://race/part-{number:03d}.tar" for number in range(6)]
            shards = [(url, remote_facts(url, QUICK)) for url in urls]
            prefix = "race/"
        for number, wrong in faults.items():
            store.faults[f"{prefix}part-{number:03d}.tar"] = list(wrong)
        with Racers(tmp_path, 6 * SIZE, [shards, shards]) as racers:
            found = racers.found()
        expected = {url: hashlib.sha256(shard_bytes(number)).hexdigest() for number, (url, _) in enumerate(shards)}
        assert sorted(found) == sorted([*expected.items()] * 2)
        for number in range(6):
            gets = store.gets(f"{prefix}part-{number:03d}.tar")
            assert len(gets) == 1 + len(faults.get(number, []))
        assert names(tmp_path) == [f"part-{number:03d}.tar" for number in range(6)]


def test_the_budget_is_kept_at_every_moment(tmp_path: Path, store: ObjectServer) -> None:
    """Two processes read 24 shards in two orders through a cache that holds three and a half."""
    shards = put_shards(store, 24)
    budget = 3 * SIZE + SIZE // 2
    for number in range(0, 24, 3):
        store.faults[f"part-{number:03d}.tar"] = [Fault(cut_at=SIZE // 2)]
    seen: list[dict[str, int]] = []
    with Racers(tmp_path, budget, [shards, shards[::-1]]) as racers:
        done = threading.Event()

        def sample() -> None:
            while not done.is_set():
                seen.append(sizes(tmp_path))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            found = racers.found()
        finally:
            done.set()
            sampler.join(10)
    expected = {url: hashlib.sha256(shard_bytes(number)).hexdigest() for number, (url, _) in enumerate(shards)}
    assert sorted(found) == sorted([*expected.items()] * 2)
    totals = [sum(one.values()) for one in seen]
    assert max(totals) <= budget
    assert max(totals) == 3 * SIZE  # it is used, too
    assert len({frozenset(one) for one in seen}) > 10  # and looked at while it changed
    assert len(entries(tmp_path)) == 3


def test_the_least_recently_used_goes_first(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 4)
    (tmp_path / "notes.txt").write_bytes(bytes(5 * SIZE))  # not ours: neither counted nor deleted
    cache = ShardCache(tmp_path, 3 * SIZE, QUICK)
    for number in (0, 1, 2, 0, 3):
        read(cache, shards[number])
        time.sleep(0.02)
    assert names(tmp_path) == ["notes.txt", "part-000.tar", "part-002.tar", "part-003.tar"]


def test_an_open_shard_outlives_its_entry(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    cache = ShardCache(tmp_path, SIZE, QUICK)
    with cache.open(*shards[0]) as file:
        cache.fetch(*shards[1])
        assert names(tmp_path) == ["part-001.tar"]
        assert os.pread(file.fileno(), SIZE, 0) == shard_bytes(0)


def test_a_reader_lets_go_of_what_was_deleted(tmp_path: Path, store: ObjectServer) -> None:
    """While a file is open, the disk still holds it, and the budget would be kept on paper only."""
    shards = put_shards(store, 4)
    reader = OpenShards(ShardStore(ShardCache(tmp_path, byte_budget=2 * SIZE, patience=QUICK)))

    def held() -> list[str]:
        open_now = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists() or path.is_symlink()]
        return [name for name in open_now if name.startswith(str(tmp_path)) and "part-" in name]

    for number, (url, facts) in enumerate(shards):
        piece = reader.read(ShardFacts(url, facts.size, facts.etag), 100, 50)
        assert piece == shard_bytes(number)[100:150]
        assert len(held()) <= 3 and sum("(deleted)" in name for name in held()) <= 1
    reader.close()
    assert held() == []


def test_a_shard_larger_than_the_budget(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    with pytest.raises(UserError, match=rf"part-000.tar has {SIZE} bytes and its cache .* may hold {SIZE - 1}, so"):
        ShardCache(tmp_path, SIZE - 1, QUICK).open(*shard)
    assert store.gets("part-000.tar") == []
    assert read(ShardCache(tmp_path, SIZE, QUICK), shard) == shard_bytes(0)


def test_running_downloads_count(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 2)
    store.faults["part-000.tar"] = [Fault(stall_at=1000)]
    cache = ShardCache(tmp_path, SIZE + SIZE // 2, QUICK)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, cache, shards[0])
        wait_until(lambda: store.gets("part-000.tar"))
        second = pool.submit(read, cache, shards[1])
        time.sleep(0.4)
        assert store.gets("part-001.tar") == []
        assert sum(sizes(tmp_path).values()) == SIZE
        store.go_on.set()
        assert (first.result(20), second.result(20)) == (shard_bytes(0), shard_bytes(1))
    assert names(tmp_path) == ["part-001.tar"]


def test_a_killed_download_blocks_nobody(tmp_path: Path, store: ObjectServer) -> None:
    shards = put_shards(store, 3)
    store.faults["part-000.tar"] = [Fault(stall_at=100_000)]
    cache = ShardCache(tmp_path, 2 * SIZE, QUICK)
    with Racers(tmp_path, 2 * SIZE, [[shards[0]]]) as racers:
        wait_until(lambda: store.gets("part-000.tar"))
        wait_until(lambda: sum(sizes(tmp_path).values()) == SIZE)
        # While it lives its file is left alone and counted.
        cache.fetch(*shards[1])
        cache.fetch(*shards[2])
        assert names(tmp_path) == ["part-000.tar.part", "part-002.tar"]
        racers.processes[0].kill()
        racers.processes[0].join(10)
    # Its room is free again.
    cache.fetch(*shards[1])
    assert names(tmp_path) == ["part-001.tar", "part-002.tar"]
    assert read(cache, shards[0]) == shard_bytes(0)


def test_what_a_killed_download_left_is_not_used(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    store.faults["part-000.tar"] = [Fault(stall_at=100_000)]
    with Racers(tmp_path, None, [[shard]]) as racers:
        wait_until(lambda: store.gets("part-000.tar"))
        wait_until(lambda: sum(sizes(tmp_path).values()) == SIZE)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, ShardCache(tmp_path, None, QUICK), shard)
            time.sleep(0.2)
            assert not waiting.done()
            racers.processes[0].kill()
            assert waiting.result(20) == shard_bytes(0)
    assert names(tmp_path) == ["part-000.tar"]


def test_a_download_that_nobody_wants_ends(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    asked = iter([True, False])
    with pytest.raises(NoLongerWantedError):
        ShardCache(tmp_path, patience=QUICK).fetch(*shard, wanted=lambda: next(asked))
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_used(tmp_path: Path, store: ObjectServer) -> None:
    [shard] = put_shards(store, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"shard cache .*file cannot take .*part-000.tar .*check") as error:
        ShardCache(tmp_path / "file", patience=QUICK).open(*shard)
    assert "\n" not in str(error.value)
