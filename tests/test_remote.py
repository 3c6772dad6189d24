"""Facts, names and ranges of objects over http, s3 and hf, from servers that fail in every way that servers fail."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from object_stores import Fault, Hub, ObjectServer, S3Server, hub_server, object_server, s3_environment, s3_server

from farnear.data.remote import (
    Patience,
    RemoteFacts,
    expand_remote,
    is_remote,
    read_pieces,
    read_range,
    remote_facts,
)
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError

DATA = random.Random(0).randbytes(700_000)
QUICK = Patience(attempts=3, seconds_first_wait=0.01, seconds_longest_wait=0.02, seconds_stalled=1.0)


@pytest.fixture
def store() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


def test_what_is_remote() -> None:
    for name in ("https://host/a.tar", "s3://bucket/a.tar", "hf://datasets/o/n/a.tar", "ftp://host/a.tar"):
        assert is_remote(name)
    for name in ("a.tar", "/data/a.tar", "file:///data/a.tar", "FILE:///a.tar", "dir/x://a.tar", "~/a-{0..3}.tar"):
        assert not is_remote(name)


def test_an_unknown_protocol_is_refused() -> None:
    for call in (expand_remote, remote_facts):
        with pytest.raises(UserError, match=r"ftp://host/a.tar has the protocol 'ftp'.*http, https, s3, hf"):
            call("ftp://host/a.tar")


def test_http_cannot_list() -> None:
    for name in ("http://host/a.tar", "http://[::1]:80/a.tar?key=[*]", "https://host/a.tar?x=1"):
        assert expand_remote(name) == [name]
    for name in ("http://host/*.tar", "http://host/a[0-9].tar"):
        with pytest.raises(UserError, match=r"http has no way to list files"):
            expand_remote(name)


def test_facts_and_ranges(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    assert facts.size == len(DATA) and len(facts.etag) == 34
    for start, stop in [(0, len(DATA)), (0, 1), (512, 5120), (len(DATA) - 1, len(DATA)), (7, 7)]:
        assert read_range(url, start, stop, facts, QUICK) == DATA[start:stop]
    assert store.gets("a.tar") == ["bytes=0-699999", "bytes=0-0", "bytes=512-5119", "bytes=699999-699999"]
    with pytest.raises(UserError, match=r"none from 0 to 700001"):
        read_range(url, 0, len(DATA) + 1, facts, QUICK)


def test_facts_are_fresh(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    before = remote_facts(url, QUICK)
    store.put("a.tar", DATA[1:])
    after = remote_facts(url, QUICK)
    assert after.size == before.size - 1 and after.etag != before.etag


def test_a_date_stands_in_for_an_etag(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    store.etags = False
    assert remote_facts(url, QUICK) == RemoteFacts(len(DATA), "")
    store.dates["a.tar"] = "Sat, 01 Nov 2025 00:00:00 GMT"
    facts = remote_facts(url, QUICK)
    assert facts == RemoteFacts(len(DATA), "Sat, 01 Nov 2025 00:00:00 GMT")
    assert read_range(url, 3, 9, facts, QUICK) == DATA[3:9]
    store.dates["a.tar"] = "Sat, 01 Nov 2025 00:00:01 GMT"
    with pytest.raises(UserError, match=r"was changed after it was indexed .its etag is Sat, 01 Nov 2025 00:00:01"):
        read_range(url, 3, 9, facts, QUICK)


PASSING: dict[str, list[Fault]] = {
    "errors of the server": [Fault(status=503), Fault(status=500)],
    "too many requests": [Fault(status=429), Fault(status=408)],
    "cut bodies": [Fault(cut_at=600_000), Fault(cut_at=0)],
    "short objects": [Fault(short_by=1), Fault(short_by=100_000)],
    "silence": [Fault(stall_at=600_000)],
    "silence before the body": [Fault(stall_at=0)],
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(store: ObjectServer, kind: str) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.faults["a.tar"] = list(PASSING[kind])
    assert read_range(url, 10, len(DATA), facts, QUICK) == DATA[10:]
    ranges = store.gets("a.tar")
    assert len(ranges) == len(PASSING[kind]) + 1
    # A body that was cut goes on where it ended.
    if kind == "cut bodies":
        assert 10 < int(ranges[1].removeprefix("bytes=").partition("-")[0]) <= 600_010 and ranges[2] == ranges[1]


LASTING: dict[str, tuple[Fault, str]] = {
    "errors of the server": (Fault(status=503), "3 attempts failed, the last one with: 503 Service Unavailable;"),
    "cut bodies": (Fault(cut_at=3), "3 attempts failed, the last one with: .*Not enough data"),
    "short objects": (Fault(short_by=1), "was changed after it was indexed .it has 699999 bytes and had 700000"),
    "long bodies": (Fault(long_by=1), "was changed after it was indexed .it sends more bytes than asked for"),
    "silence": (Fault(stall_at=0), "3 attempts failed, the last one with: .*[Tt]imeout"),
}


@pytest.mark.parametrize("kind", LASTING)
def test_what_lasts_is_an_error(store: ObjectServer, kind: str) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    fault, message = LASTING[kind]
    store.faults["a.tar"] = [fault] * 3 + [Fault(status=404)]  # a fourth attempt would say so
    with pytest.raises(UserError, match=f"{url} .*{message}") as error:
        read_range(url, 0, len(DATA) - 1, facts, Patience(3, 0.01, 0.02, 0.3))
    assert_one_line(error)
    assert len(store.gets("a.tar")) == 3


def test_facts_are_tried_again(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    store.head_status = [503, 503, 429, 429]  # each attempt is a HEAD and then a GET
    assert remote_facts(url, QUICK).size == len(DATA)
    store.head_status = [503] * 6 + [404] * 2
    with pytest.raises(UserError, match=f"{url} cannot be read: 3 attempts failed, the last one with: 503 "):
        remote_facts(url, QUICK)
    assert store.head_status == [404, 404]


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_missing_and_forbidden_at_once(store: ObjectServer, status: int) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.faults["a.tar"] = [Fault(status=status)]
    store.head_status = [status] * 2
    for call in (lambda: read_range(url, 0, 9, facts, QUICK), lambda: remote_facts(url, QUICK)):
        with pytest.raises(UserError, match=f"{url} cannot be read .{status} .*check the url") as error:
            call()
        assert_one_line(error)
    assert store.head_status == [] and len(store.gets("a.tar")) == 2


def test_no_server(store: ObjectServer) -> None:
    with object_server() as gone:
        url = gone.url + "/a.tar"
    for call in (
        lambda: remote_facts(url, QUICK),
        lambda: read_range(url, 0, 9, RemoteFacts(9, ""), QUICK),
    ):
        with pytest.raises(UserError, match=f"{url} cannot be read: 3 attempts failed.*[Cc]onnect call failed"):
            call()


def test_an_object_replaced_between_facts_and_read(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.put("a.tar", DATA[::-1])  # of the same size: only the etag tells
    with pytest.raises(UserError, match=r"a.tar was changed after it was indexed .its etag is .* and was .*build"):
        read_range(url, 0, 9, facts, QUICK)


def test_an_object_replaced_between_two_requests_of_a_read(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.faults["a.tar"] = [Fault(cut_at=1000), Fault(replace=DATA[::-1])]
    with pytest.raises(UserError, match=r"was changed after it was indexed"):
        read_range(url, 0, len(DATA), facts, QUICK)


def test_a_smaller_object_without_the_range(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.put("a.tar", b"")
    with pytest.raises(UserError, match=r"was changed after it was indexed .it has no byte 699999"):
        read_range(url, 699_000, 700_000, facts, QUICK)


def test_a_server_without_ranges_serves_whole_objects(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    store.ranges = False
    facts = remote_facts(url, QUICK)
    assert read_range(url, 0, len(DATA), facts, QUICK) == DATA
    with pytest.raises(UserError, match=r"sends whole objects only.*set data.remote: cache"):
        read_range(url, 5, 9, facts, QUICK)


def test_a_server_without_ranges_is_noticed_at_once(store: ObjectServer, tmp_path: Path) -> None:
    url = store.put("a.tar", DATA)
    shards = ShardStore(ShardCache(tmp_path), ranged=True)
    shards = replace(shards, known={url: shards.facts(url)})
    shards.try_out()
    store.ranges = False
    replace(shards, ranged=False).try_out()
    with pytest.raises(UserError, match=r"sends whole objects only"):
        shards.try_out()


def test_pieces_come_while_the_rest_is_on_its_way(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.faults["a.tar"] = [Fault(stall_at=1000)]
    pieces = read_pieces(url, 0, len(DATA), facts, QUICK)
    first = next(pieces)
    assert first == DATA[: len(first)] and len(first) <= 1000
    pieces.close()


def test_waits_double_up_to_a_limit(store: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    store.faults["a.tar"] = [Fault(status=503)] * 6
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    state = random.getstate()
    with pytest.raises(UserError, match=r"6 attempts"):
        read_range(url, 0, 9, facts, Patience(6, 1.0, 6.0))
    assert random.getstate() == state
    assert len(waits) == 5
    for wait, most in zip(waits, [1, 2, 4, 6, 6], strict=True):
        assert most / 2 <= wait <= most
    assert len({wait / most for wait, most in zip(waits, [1, 2, 4, 6, 6], strict=True)}) == 5


def test_no_key_in_a_message(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA) + "?signature=hush"
    assert read_range(url, 0, 9, remote_facts(url, QUICK), QUICK) == DATA[:9]
    missing = store.url.replace("http://", "http://me:hush@") + "/b.tar?signature=hush"
    with object_server() as gone:
        refused = gone.url + "/b.tar?signature=hush"
    for name in (missing, refused, "http:///b.tar?signature=hush"):
        for call in (
            lambda name=name: remote_facts(name, QUICK),
            lambda name=name: read_range(name, 0, 9, RemoteFacts(9, ""), QUICK),
        ):
            with pytest.raises(UserError, match=r"/b.tar") as error:
                call()
            assert "hush" not in str(error.value)


MISSING_PACKAGES = """
import sys
from farnear.data.remote import RemoteFacts, read_range, remote_facts
from farnear.errors import UserError
sys.modules.update({"aiohttp": None, "s3fs": None})
for url, extra in (("http://h/a", "http"), ("s3://b/a", "s3")):
    for call in (remote_facts, lambda url: read_range(url, 0, 1, RemoteFacts(1, ""))):
        try:
            call(url)
        except UserError as error:
            assert f"pip install 'farnear[{extra}]'" in str(error), error
        else:
            raise AssertionError("no error")
print("named")
"""


def test_a_missing_package() -> None:
    ran = subprocess.run([sys.executable, "-c", MISSING_PACKAGES], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "named\n", ran.stderr


def test_threads_read_at_once(store: ObjectServer) -> None:
    url = store.put("a.tar", DATA)
    facts = remote_facts(url, QUICK)
    found: dict[int, bytes] = {}

    def read(number: int) -> None:
        found[number] = read_range(url, number * 1000, number * 1000 + 500, facts, QUICK)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {number: DATA[number * 1000 : number * 1000 + 500] for number in range(8)}


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[S3Server, Any]]:
    """An S3 server with the bucket "pages", and a client; the environment points there."""
    pytest.importorskip("moto.server")
    with s3_server() as server, s3_environment(server.url) as client:
        client.create_bucket(Bucket="pages")
        yield server, client


def test_s3(s3: tuple[S3Server, Any]) -> None:
    _, client = s3
    for name in ("b/part-001.tar", "b/part-000.tar", "b/part-000.tar.json", "b/deep/part-002.tar"):
        client.put_object(Bucket="pages", Key=name, Body=DATA)
    urls = expand_remote("s3://pages/b/part-*.tar", QUICK)
    assert urls == ["s3://pages/b/part-000.tar", "s3://pages/b/part-001.tar"]
    client.put_object(Bucket="pages", Key="b/part-00x.tar", Body=DATA)  # the listing is made anew
    assert len(expand_remote("s3://pages/b/part-*.tar", QUICK)) == 3
    assert expand_remote("s3://pages/b/part-00?.tar", QUICK) == expand_remote("s3://pages/b/part-*.tar", QUICK)
    assert expand_remote("s3://pages/not-there.tar", QUICK) == ["s3://pages/not-there.tar"]
    facts = remote_facts(urls[0], QUICK)
    assert facts.size == len(DATA) and facts.etag.startswith('"')
    for start, stop in [(0, len(DATA)), (512, 5120), (len(DATA) - 1, len(DATA))]:
        assert read_range(urls[0], start, stop, facts, QUICK) == DATA[start:stop]


def test_s3_missing(s3: tuple[S3Server, Any]) -> None:
    _, client = s3
    client.put_object(Bucket="pages", Key="folder/a.tar", Body=b"x")
    for pattern, message in [
        ("s3://pages/none-*.tar", "matches no file"),
        ("s3://no-bucket/none-*.tar", "matches no file|404"),
    ]:
        with pytest.raises(UserError, match=message):
            expand_remote(pattern, QUICK)
    for url, message in [
        ("s3://pages/none.tar", "none.tar cannot be read .*check the url"),
        ("s3://no-bucket/none.tar", "none.tar cannot be read .*check the url"),
        ("s3://pages/folder", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            remote_facts(url, QUICK)
        assert_one_line(error)
    with pytest.raises(UserError, match=r"none.tar cannot be read .404 Not Found"):
        read_range("s3://pages/none.tar", 0, 1, RemoteFacts(1, '"x"'), QUICK)


def test_s3_changed(s3: tuple[S3Server, Any]) -> None:
    _, client = s3
    client.put_object(Bucket="pages", Key="c.tar", Body=DATA)
    facts = remote_facts("s3://pages/c.tar", QUICK)
    client.put_object(Bucket="pages", Key="c.tar", Body=DATA[::-1])
    assert remote_facts("s3://pages/c.tar", QUICK) != facts
    with pytest.raises(UserError, match=r"c.tar was changed after it was indexed .its etag"):
        read_range("s3://pages/c.tar", 0, 9, facts, QUICK)


S3_FAULTS = {
    "errors of the server": [Fault(status=503), Fault(status=500)],
    "cut bodies": [Fault(cut_at=600_000), Fault(cut_at=0)],
    "silence": [Fault(stall_at=1000)],
}


@pytest.mark.parametrize("kind", S3_FAULTS)
def test_s3_tries_again_in_one_place(s3: tuple[S3Server, Any], kind: str) -> None:
    """The requests that reach the server are counted: neither s3fs nor botocore adds attempts of its own."""
    server, client = s3
    client.put_object(Bucket="pages", Key="d.tar", Body=DATA)
    facts = remote_facts("s3://pages/d.tar", QUICK)
    server.requests.clear()
    server.faults["pages/d.tar"] = list(S3_FAULTS[kind])
    assert read_range("s3://pages/d.tar", 0, len(DATA), facts, QUICK) == DATA
    assert len(server.gets("pages/d.tar")) == len(S3_FAULTS[kind]) + 1
    server.requests.clear()
    server.faults["pages/d.tar"] = [*[S3_FAULTS[kind][-1]] * 3, Fault(status=404)]
    with pytest.raises(UserError, match=r"d.tar cannot be read: 3 attempts failed"):
        read_range("s3://pages/d.tar", 0, len(DATA), facts, QUICK)
    assert len(server.gets("pages/d.tar")) == 3
    server.faults.clear()


@pytest.fixture
def hub(network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import fsspec

    with hub_server() as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
        yield server


def test_hf(hub: Hub) -> None:
    for name in ("part-001.tar", "part-000.tar", "README.md"):
        hub.files[name] = DATA
    urls = expand_remote("hf://datasets/org/pages/part-*.tar", QUICK)
    assert urls == ["hf://datasets/org/pages/part-000.tar", "hf://datasets/org/pages/part-001.tar"]
    facts = remote_facts(urls[0], QUICK)
    assert facts.size == len(DATA) and len(facts.etag) == 64
    for start, stop in [(0, len(DATA)), (512, 5120), (len(DATA) - 1, len(DATA))]:
        assert read_range(urls[0], start, stop, facts, QUICK) == DATA[start:stop]
    hub.files["part-002.tar"] = DATA
    assert len(expand_remote("hf://datasets/org/pages/part-*.tar", QUICK)) == 3  # the listing is made anew
    with pytest.raises(UserError, match=r"none.tar cannot be read"):
        remote_facts("hf://datasets/org/pages/none.tar", QUICK)
    hub.files["part-000.tar"] = DATA[::-1]
    assert remote_facts(urls[0], QUICK) != facts
    with pytest.raises(UserError, match=r"part-000.tar was changed after it was indexed"):
        read_range(urls[0], 0, len(DATA), facts, QUICK)
