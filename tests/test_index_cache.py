"""Scan once: what is in the cache folder is not scanned again, and what is torn or changed is."""

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tar_makers import STORE, image_bytes, index_of, pair_members, write_pairs, write_tar
from test_index import CORPUS, columns_of, reference

from farnear.data import index_cache, join, shard_jobs
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, SourceShards, cache_folder, cached_index
from farnear.errors import RunStoppedError, UserError


def set_of(*sources: Sequence[Path], corpus: Sequence[Path] = (), **keys: Any) -> ShardSet:
    named = [SourceShards(f"s{number}", tuple(map(str, shards))) for number, shards in enumerate(sources)]
    return ShardSet(tuple(named), tuple(map(str, corpus)), **keys)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names_of_scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are scanned from now on."""
    names: list[str] = []
    scan = index_cache.scan_shard

    def noted(file: Any, shard: str, corpus: bool) -> Any:
        names.append(Path(shard).name)
        return scan(file, shard, corpus)

    monkeypatch.setattr(index_cache, "scan_shard", noted)
    return names


def test_the_cached_index_is_the_index(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 9, 3, negatives_of_pair=2)
    corpus = [write_tar(tmp_path / "corpus.tar", CORPUS)]
    index, expected = cached_index(set_of(shards, corpus=corpus), cache, STORE), index_of(shards, corpus=corpus)
    assert columns_of(index) == columns_of(expected)
    assert (index.fingerprint, index.faults, index.shards) == (expected.fingerprint, expected.faults, expected.shards)
    assert index.path is not None and index.path.is_relative_to(cache)


def test_only_what_changed_is_scanned_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = names_of_scanned(monkeypatch)
    shards = write_pairs(tmp_path, 9, 3)
    first = cached_index(set_of(shards), cache, STORE)
    assert sorted(scanned) == ["part-000.tar", "part-001.tar", "part-002.tar"]
    scanned.clear()
    assert cached_index(set_of(shards), cache, STORE).fingerprint == first.fingerprint
    assert scanned == []
    # Another selection, other exclusions, another limit: the same scans.
    some = cached_index(set_of(shards[:2], shards[2:], exclude=((str(shards[0]), "k00000"),)), cache, STORE)
    assert len(some) == 8
    assert not len(cached_index(set_of(shards, max_image_pixels=23), cache, STORE))
    assert scanned == []
    data = shards[1].read_bytes()
    shards[1].write_bytes(data.replace(b"query 4", b"other 4"))  # as many bytes
    changed = cached_index(set_of(shards), cache, STORE)
    assert scanned == ["part-001.tar"]
    assert changed.fingerprint != first.fingerprint
    assert (changed.query_hash_N != first.query_hash_N).tolist() == [pair == 4 for pair in range(9)]
    scanned.clear()
    assert len(cached_index(set_of(shards[:1], corpus=shards[:1]), cache, STORE).corpus_C) == 3
    assert scanned == ["part-000.tar"]  # as a corpus shard


def test_torn_files_are_made_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_pairs(tmp_path, 4, 2)
    first = cached_index(set_of(shards), cache, STORE)
    assert first.path is not None
    before = columns_of(first)
    scanned = names_of_scanned(monkeypatch)
    shutil.copy(first.path, tmp_path / "copy")  # `first` is a map of the file itself
    first.path.unlink()
    first.path.write_bytes((tmp_path / "copy").read_bytes()[:-100])
    assert columns_of(cached_index(set_of(shards), cache, STORE)) == before
    assert scanned == []
    scans = sorted((cache / "scans").iterdir())
    assert len(scans) == 2
    whole = scans[0].read_bytes()
    place = whole.index(b"k0000")
    flipped = whole[:place] + b"X" + whole[place + 1 :]
    for torn in (whole[:-1], whole[:100], b"", bytes(len(whole)), flipped):
        for path in cache.glob("indexes/*/index.arrow"):
            path.unlink()
        scans[0].unlink()
        scans[0].write_bytes(torn)
        assert columns_of(cached_index(set_of(shards), cache, STORE)) == before
        assert len(scanned) == 1
        scanned.clear()


def test_interrupted_indexing_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_pairs(tmp_path, 8, 4)
    scan = index_cache.scan_shard
    seen: list[str] = []

    def interrupted(file: Any, shard: str, corpus: bool) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(shard)
        return scan(file, shard, corpus)

    monkeypatch.setattr(index_cache, "scan_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_index(set_of(shards), cache, STORE)
    monkeypatch.undo()
    scanned = names_of_scanned(monkeypatch)
    assert len(cached_index(set_of(shards), cache, STORE)) == 8
    assert len(scanned) == 2
    assert not [path for path in cache.rglob("*") if path.name.endswith(".tmp")]


def test_several_processes_find_what_one_finds(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = write_pairs(tmp_path, 20, 3, negatives_of_pair=2)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-9000])  # the end of the archive is at 10240 or more bytes from the end
    alone = cached_index(set_of(shards), cache / "alone", STORE, processes=1)
    together = cached_index(set_of(shards), cache / "together", STORE, processes=2)
    assert columns_of(together) == columns_of(alone)
    assert (together.fingerprint, together.faults) == (alone.fingerprint, alone.faults)
    assert capfd.readouterr().err == ""  # a bar is for a terminal


def test_a_faulty_shard_is_told_by_a_process_as_by_oneself(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 4, 2)
    shards[1].unlink()
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"part-001.tar cannot be read \(No such file"):
            cached_index(set_of(shards), cache, STORE, processes=processes)


def kill_oneself(job: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError, match="a process was killed while indexing"):
        list(shard_jobs.run_jobs(kill_oneself, [(tmp_path, 1), (tmp_path, 2)], "indexing", 2))


def build(shard_set: ShardSet, cache: Path, noted: Path) -> None:
    write = index_cache.write_index

    def write_noted(index: Index, path: Path) -> None:
        with open(noted, "a") as file:
            file.write("written\n")
        write(index, path)

    index_cache.write_index = write_noted
    try:
        assert len(cached_index(shard_set, cache, STORE)) == 8
    finally:
        index_cache.write_index = write


def test_racing_processes_build_once(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 8, 2)
    noted = tmp_path / "noted"
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=build, args=(set_of(shards), cache, noted)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert noted.read_text() == "written\n"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 2, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the cache folder .*file/cache cannot be written \(Not a directory") as error:
        cached_index(set_of(shards), tmp_path / "file" / "cache", STORE)
    assert "data.cache_dir or FARNEAR_CACHE" in str(error.value) and "\n" not in str(error.value)


def test_a_full_disk_is_a_user_error(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache, "write_columns", full)
    with pytest.raises(UserError, match="No space left on device"):
        cached_index(set_of(write_pairs(tmp_path, 2, 1)), cache, STORE)


def test_a_finished_index_needs_no_writing(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 2, 1)
    path = cached_index(set_of(shards), cache, STORE).path
    assert path is not None
    shutil.rmtree(cache / "scans")
    (path.parent / "index.lock").unlink()
    assert len(cached_index(set_of(shards), cache, STORE)) == 2
    assert not (path.parent / "index.lock").exists()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARNEAR_CACHE", str(tmp_path / "env"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("~/named") == tmp_path / "named"
    assert cache_folder(None) == tmp_path / "env"
    monkeypatch.delenv("FARNEAR_CACHE")
    assert cache_folder(None) == tmp_path / ".cache" / "farnear"


USELESS = {
    "empty": (lambda path: path.write_bytes(b""), "a.tar is an empty file; write it again"),
    "text": (lambda path: path.write_bytes(b"x" * 600), "a.tar is not a tar file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)), "a.tar is compressed with gzip"),
    "no members": (lambda path: write_tar(path, []), "a.tar holds no pair; its members must be named KEY.json"),
    "pages only": (
        lambda path: write_tar(path, CORPUS),
        r"holds nothing .* at byte 512 'doc0' has no query .*and 5 faults",
    ),
}


@pytest.mark.parametrize("kind", USELESS)
def test_a_shard_that_gives_nothing_is_refused(tmp_path: Path, cache: Path, kind: str) -> None:
    write, message = USELESS[kind]
    good = write_pairs(tmp_path, 2, 1)
    write(tmp_path / "a.tar")
    with pytest.raises(UserError, match=message) as error:
        cached_index(set_of([*good, tmp_path / "a.tar"]), cache, STORE)
    assert "\n" not in str(error.value)


def test_a_corpus_without_documents_is_refused(tmp_path: Path, cache: Path) -> None:
    good, empty = write_pairs(tmp_path, 2, 1), write_tar(tmp_path / "a.tar", [("a.json", b"{}")])
    with pytest.raises(UserError, match=r"a.tar holds no page; its members must be named KEY.png"):
        cached_index(set_of(good, corpus=[empty]), cache, STORE)


def test_damage_elsewhere_is_a_fault_and_no_error(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 6, 2)
    shards[1].write_bytes(shards[1].read_bytes()[: 4 * 1024 + 100])
    index = cached_index(set_of(shards), cache, STORE)
    assert len(index) == 4
    assert {fault.kind for fault in index.faults} == {"cut_short", "next_to_damage"}


def test_a_corpus_of_each_source(tmp_path: Path, cache: Path) -> None:
    for name, page in (("one", 1), ("two", 2)):
        write_tar(tmp_path / f"{name}.tar", [reference(name, pos_id="doc")])
        write_tar(tmp_path / f"{name}-corpus.tar", [("doc.png", image_bytes(page))])
    sources = [
        SourceShards(name, (str(tmp_path / f"{name}.tar"),), (str(tmp_path / f"{name}-corpus.tar"),))
        for name in ("one", "two")
    ]
    index = cached_index(ShardSet(tuple(sources)), cache, STORE)
    assert not index.faults and index.sources == ("one", "two")
    assert len(set(index.input_hash_I[index.positives].tolist())) == 2


def test_a_shard_written_while_it_is_scanned(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = write_pairs(tmp_path, 2, 1)
    scan = index_cache.scan_shard

    def growing(file: Any, name: str, corpus: bool) -> Any:
        with suppress(OSError), open(name, "ab") as more:
            more.write(bytes(512))
        return scan(file, name, corpus)

    monkeypatch.setattr(index_cache, "scan_shard", growing)
    with pytest.raises(UserError, match="changed while it was scanned"):
        cached_index(set_of([shard]), cache, STORE)


def test_defaults_agree() -> None:
    assert ShardSet().max_image_pixels == join.MAX_IMAGE_PIXELS
    assert pair_members("k", "q", 1)[0][0] == "k.json"


def test_an_index_whose_names_cannot_be_read_is_built_again(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 3, 1)
    index = cached_index(set_of(shards), cache, STORE)
    expected = columns_of(index)
    assert index.path is not None
    index.path.write_bytes(index.path.read_bytes().replace(b"part_size_M", b"part_\xe1ize_M"))
    assert columns_of(cached_index(set_of(shards), cache, STORE)) == expected


def test_an_index_whose_bytes_changed_is_built_again(tmp_path: Path, cache: Path) -> None:
    shards = write_pairs(tmp_path, 9, 3)
    index = cached_index(set_of(shards), cache, STORE)
    expected = columns_of(index)
    assert index.path is not None
    data = index.path.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        index.path.write_bytes(damaged)
        assert columns_of(cached_index(set_of(shards), cache, STORE)) == expected
