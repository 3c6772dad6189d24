"""Pages become requests, requests answers, and answers pairs; on the way there is a real server on this machine."""

import base64
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tar_makers import image_bytes, write_tar

from farnear import cli
from farnear.errors import UserError
from farnear.ingest.pages import list_pages
from farnear.ingest.query_answers import choose, import_answers, parse_answer, words_of
from farnear.ingest.query_requests import DEFAULT_PROMPT, export_requests
from farnear.ingest.query_sending import Server, send_requests
from farnear.ingest.shards import CorpusPage, write_shards


def write_corpus(folder: Path, pages: int = 6, *, about: bool = True, name: str = "corpus") -> Path:
    """Pages of two documents; page i's text is "page i has text of its own"."""

    def page(number: int) -> CorpusPage:
        text = {"document": f"doc {number % 2}", "page": number + 1, "text": f"page {number} has text of its own"}
        return CorpusPage(f"p{number}", image_bytes(number), "png", text if about else None)

    [shard] = write_shards(map(page, range(pages)), folder, prefix=name)
    return shard


def requests_in(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def image_of(request: dict[str, Any]) -> tuple[str, bytes]:
    """Media type and bytes of the page in a request."""
    _, part = request["body"]["messages"][0]["content"]
    kind, _, data = part["image_url"]["url"].partition(";base64,")
    return kind.removeprefix("data:"), base64.b64decode(data)


class StandIn:
    """A server like the real ones: busy at times, and strict about what it is sent.

    Attributes:
        moods: for each custom page image the statuses to answer with, in turn, before answers come.
        served: how often each page was answered.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.moods: dict[bytes, list[int]] = {}
        self.served: Counter[bytes] = Counter()
        self.tries: Counter[bytes] = Counter()
        self.at_once = self.most_at_once = 0
        self.seconds_per_answer = 0.0
        self.key: str | None = None

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            return 401, {}, b'{"error": "no such key"}'
        if handler.path != "/v1/chat/completions" or body["model"] != "tiny":
            return 404, {}, b"unknown model or path"
        _, image = image_of({"body": body})
        with self.lock:
            self.tries[image] += 1
            mood = self.moods.get(image, [])
            status = mood.pop(0) if mood else 200
        if status == 302:
            return status, {"Location": "http://127.0.0.1:1/"}, b""
        if status != 200:
            return status, {"Retry-After": "0"} if status == 429 else {}, b"not now"
        time.sleep(self.seconds_per_answer)
        with self.lock:
            self.served[image] += 1
        with Image.open(io.BytesIO(image)) as picture:
            number = picture.convert("RGB").getpixel((0, 0))[0]
        content = json.dumps({"queries": [f"What is told about {number}?", f"subject number {number}"]})
        return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, StandIn]]:
    state = StandIn()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with state.lock:
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            status, headers, data = state.answer(self)
            with state.lock:
                state.at_once -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("farnear.ingest.query_sending._FIRST_WAIT_SECONDS", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", state
        server.shutdown()
        thread.join()


@pytest.fixture
def requests(tmp_path: Path) -> list[Path]:
    files, _ = export_requests([write_corpus(tmp_path)], tmp_path / "requests.jsonl", model="tiny")
    return files


def test_a_request_holds_prompt_page_and_parameters(tmp_path: Path) -> None:
    shard = write_corpus(tmp_path)
    (tmp_path / "prompt.txt").write_text('Give {n} queries, {n}, as {"queries": ["größer"]}', encoding="utf-8")
    files, count = export_requests(
        [shard],
        tmp_path / "out" / "requests.jsonl",
        model="some/model",
        prompt=tmp_path / "prompt.txt",
        queries_per_page=2,
        response_format="json_schema",
        extra_body='{"temperature": 0.5}',
    )
    assert [path.name for path in files] == ["requests-00000.jsonl"]
    assert list((tmp_path / "out").iterdir()) == files
    requests = requests_in(files)
    assert count == len(requests) == 6
    assert [request["custom_id"] for request in requests] == [f"corpus-000000.tar/p{number}" for number in range(6)]
    first = requests[0]
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    assert first["body"]["model"] == "some/model"
    assert first["body"]["temperature"] == 0.5
    assert first["body"]["response_format"]["json_schema"]["schema"]["required"] == ["queries"]
    text, _ = first["body"]["messages"][0]["content"]
    assert text == {"type": "text", "text": 'Give 2 queries, 2, as {"queries": ["größer"]}'}
    assert [image_of(request) for request in requests] == [("image/png", image_bytes(number)) for number in range(6)]


def test_the_prompt_of_the_package_asks_for_json_that_is_understood() -> None:
    text = DEFAULT_PROMPT.read_text(encoding="utf-8")
    assert "{n}" in text
    assert parse_answer(text.splitlines()[-1]) == ["first query", "second query"]


def test_long_pages_are_sent_smaller_and_others_as_they_are(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (200, 400), (10, 20, 30, 255)).save(stream, "WEBP", lossless=True)
    pages = [CorpusPage("long", stream.getvalue(), "webp"), CorpusPage("short", image_bytes(1, "JPEG"), "jpg")]
    shards = write_shards(pages, tmp_path, prefix="corpus")
    files, _ = export_requests(shards, tmp_path / "small.jsonl", model="m", max_side=100)
    (kind, data), short = map(image_of, requests_in(files))
    with Image.open(io.BytesIO(data)) as picture:
        assert (kind, picture.format, picture.size) == ("image/jpeg", "JPEG", (50, 100))
        assert abs(picture.getpixel((25, 50))[1] - 20) < 4
    assert short == ("image/jpeg", image_bytes(1, "JPEG"))
    files, _ = export_requests(shards, tmp_path / "whole.jsonl", model="m")
    assert image_of(requests_in(files)[0]) == ("image/webp", stream.getvalue())


def test_files_are_cut_before_they_are_too_large(tmp_path: Path, requests: list[Path]) -> None:
    lines = requests[0].read_bytes().splitlines(keepends=True)
    most = len(lines[0]) + len(lines[1])
    files, _ = export_requests([tmp_path / "corpus-000000.tar"], tmp_path / "cut.jsonl", model="tiny", max_bytes=most)
    assert [path.name for path in files] == [f"cut-0000{number}.jsonl" for number in range(3)]
    assert max(path.stat().st_size for path in files) <= most
    assert b"".join(path.read_bytes() for path in files) == requests[0].read_bytes()
    with pytest.raises(UserError, match=r"p0 has \d+ bytes, more than the 100.*--max-side"):
        export_requests([tmp_path / "corpus-000000.tar"], tmp_path / "tiny.jsonl", model="tiny", max_bytes=100)
    assert not list(tmp_path.glob("tiny*"))


def test_mistakes_of_an_export(tmp_path: Path, requests: list[Path]) -> None:
    shard = tmp_path / "corpus-000000.tar"
    out = tmp_path / "more.jsonl"
    (tmp_path / "prompt.txt").write_text("Three queries, please")
    (tmp_path / "other").mkdir()
    twin = write_corpus(tmp_path / "other", 1)
    broken = write_tar(tmp_path / "broken.tar", [("p0.png", b"no picture")])
    no_pages = write_tar(tmp_path / "no-pages.tar", [("p0.txt", b"text")])
    for words, shards, options in (
        ("does not say {n}", [shard], {"prompt": tmp_path / "prompt.txt"}),
        ("nowhere.txt cannot be read", [shard], {"prompt": tmp_path / "nowhere.txt"}),
        ("--extra-body is no JSON", [shard], {"extra_body": "temperature=1"}),
        ("without model and messages", [shard], {"extra_body": '{"model": "x"}'}),
        ("nowhere.tar does not exist", [tmp_path / "nowhere.tar"], {}),
        ("p0 is in .* and in .*name of its own", [shard, twin], {}),
        ("p0 is a file which is no image", [broken], {}),
        ("no-pages.tar holds no page", [no_pages], {}),
        ("prompt.txt is no tar", [tmp_path / "prompt.txt"], {}),
    ):
        with pytest.raises(UserError, match=words):
            export_requests(shards, out, model="m", **options)
    with pytest.raises(UserError, match=r"requests-00000\.jsonl.*would mix"):
        export_requests([shard], tmp_path / "requests.jsonl", model="m")
    assert not list(tmp_path.glob("more*"))


def test_a_damaged_shard_is_no_short_one(tmp_path: Path) -> None:
    shard = write_corpus(tmp_path)
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        offset = tar.getmember("p3.png").offset
    for name, damaged in (
        ("header", data[:offset] + b"x" * 512 + data[offset + 512 :]),
        ("cut", data[: offset + 600]),
        ("no-end", data[:offset]),
    ):
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}\.tar is (damaged at byte|no tar)"):
            list_pages([tmp_path / f"{name}.tar"])
    assert len(list_pages([shard])) == 6


def test_busy_servers_are_asked_again(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, server = stand_in
    server.seconds_per_answer = 0.05
    server.moods = {image_bytes(0): [429, 500], image_bytes(1): [503], image_bytes(4): [429, 429, 429]}
    answers = tmp_path / "answers.jsonl"
    words = ["shards", "queries", "run", str(requests[0]), "--endpoint", endpoint, "--answers", str(answers)]
    assert cli.main([*words, "--concurrency", "3"]) == 0
    assert "6 answered, 0 failed" in capsys.readouterr().out
    assert [server.tries[image_bytes(number)] for number in range(6)] == [3, 2, 1, 1, 4, 1]
    assert 2 <= server.most_at_once <= 3
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["custom_id"] for line in lines} == {f"corpus-000000.tar/p{number}" for number in range(6)}
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in lines)
    # Everything is answered, so nothing is sent.
    assert cli.main(words) == 0
    assert "6 answered (6 by an earlier run), 0 failed" in capsys.readouterr().out
    assert server.tries.total() == 12


def test_a_server_says_when_to_come_again(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, server = stand_in
    monkeypatch.setattr("farnear.ingest.query_sending._FIRST_WAIT_SECONDS", 60.0)
    server.moods = {image_bytes(number): [429] for number in range(6)}  # with Retry-After: 0
    started = time.monotonic()
    outcomes = list(send_requests(requests, tmp_path / "answers.jsonl", Server(endpoint)))
    assert [outcome.failure for outcome in outcomes] == [None] * 6
    assert time.monotonic() - started < 20


def test_a_failed_request_is_named_and_sent_again_by_the_next_run(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, server = stand_in
    server.moods = {image_bytes(2): [400], image_bytes(3): [500, 500]}
    answers = tmp_path / "answers.jsonl"
    words = ["shards", "queries", "run", str(requests[0]), "--endpoint", endpoint, "--answers", str(answers)]
    assert cli.main([*words, "--attempts", "2"]) == 1
    output = capsys.readouterr()
    assert "corpus-000000.tar/p2 failed: HTTP 400 not now" in output.out
    assert "corpus-000000.tar/p3 failed: HTTP 500 not now" in output.out
    assert "2 requests without an answer" in output.err
    assert cli.main(words) == 0
    assert "6 answered (4 by an earlier run), 0 failed" in capsys.readouterr().out
    assert server.served == Counter({image_bytes(number): 1 for number in range(6)})


def test_what_no_waiting_mends_ends_the_run(
    tmp_path: Path,
    requests: list[Path],
    stand_in: tuple[str, StandIn],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint, server = stand_in
    answers = tmp_path / "answers.jsonl"
    words = ["shards", "queries", "run", str(requests[0]), "--answers", str(answers), "--endpoint"]
    server.key = "secret"
    monkeypatch.setenv("MY_KEY", "wrong")
    monkeypatch.setenv("NO_KEY", "")
    for extra, message in (
        ([endpoint, "--api-key-env", "MY_KEY"], "refuses requests (HTTP 401"),
        ([endpoint, "--api-key-env", "NO_KEY"], "NO_KEY is empty"),
        ([f"{endpoint}/v2"], "refuses requests (HTTP 401"),
        (["http://127.0.0.1:1/v1", "--attempts", "2"], "http://127.0.0.1:1/v1/chat/completions cannot be reached"),
        (["localhost:8000"], "'localhost:8000' is no address"),
    ):
        assert cli.main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert answers.read_bytes() == b""
    monkeypatch.setenv("MY_KEY", "secret")
    assert cli.main([*words, endpoint, "--api-key-env", "MY_KEY"]) == 0
    assert server.served.total() == 6


def test_a_key_is_not_carried_to_another_server(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn]
) -> None:
    endpoint, server = stand_in
    server.moods = {image_bytes(number): [302] for number in range(6)}
    with pytest.raises(UserError, match=r"refuses requests \(HTTP 302"):
        list(send_requests(requests, tmp_path / "answers.jsonl", Server(endpoint, "secret"), concurrency=1))


def test_answers_that_came_before_the_end_are_kept(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn]
) -> None:
    endpoint, server = stand_in
    server.moods = {image_bytes(3): [401]}
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match="401"):
        list(send_requests(requests, answers, Server(endpoint), concurrency=2))
    assert len(answers.read_text().splitlines()) == server.served.total() >= 2
    list(send_requests(requests, answers, Server(endpoint)))
    assert server.served == Counter({image_bytes(number): 1 for number in range(6)})


def test_half_a_last_line_is_cut_off(tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn]) -> None:
    endpoint, server = stand_in
    answers = tmp_path / "answers.jsonl"
    list(send_requests(requests, answers, Server(endpoint), concurrency=1))
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-30])
    outcomes = list(send_requests(requests, answers, Server(endpoint)))
    assert [one.custom_id for one in outcomes if not one.by_earlier_run] == ["corpus-000000.tar/p5"]
    assert answers.read_bytes() == whole
    assert server.served.total() == 7


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn]) -> None:
    endpoint, server = stand_in
    server.seconds_per_answer = 0.2
    answers = tmp_path / "answers.jsonl"
    words = ["shards", "queries", "run", str(requests[0]), "--endpoint", endpoint, "--answers", str(answers)]
    program = f"from farnear.cli import main; main({[*words, '--concurrency', '1']!r})"
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not answers.exists() or answers.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="another run is writing"):
        list(send_requests(requests, answers, Server(endpoint)))
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    kept = answers.read_bytes().count(b"\n")
    assert 2 <= kept < 6
    outcomes = list(send_requests(requests, answers, Server(endpoint)))
    assert [one.by_earlier_run for one in outcomes] == [True] * kept + [False] * (6 - kept)
    assert len({json.loads(line)["custom_id"] for line in answers.read_text().splitlines()}) == 6


def test_files_that_are_no_requests(tmp_path: Path, requests: list[Path]) -> None:
    (tmp_path / "text.jsonl").write_text("hello\n")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "answer.jsonl").write_text('{"custom_id": "a"}\n')
    for files, words in (
        ([tmp_path / "text.jsonl"], "text.jsonl line 1 is no JSON"),
        ([tmp_path / "other.jsonl"], "other.jsonl line 1 has no custom_id"),
        ([tmp_path / "answer.jsonl"], "a is no request with a url and a body"),
        ([tmp_path / "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            list(send_requests(files, tmp_path / "answers.jsonl", Server("http://127.0.0.1:1/v1")))


@pytest.mark.parametrize(
    ("content", "queries"),
    [
        ('["a", " b "]', ["a", "b"]),
        ('{"queries": ["a"]}', ["a"]),
        ('{"queries": [{"query": "a", "kind": "table"}, {"question": "b"}]}', ["a", "b"]),
        ('[{"query": "a"}]', ["a"]),
        ('{"query": "a"}', ["a"]),
        ('Here you are:\n```json\n{"queries": ["a"]}\n```\nGood luck!', ["a"]),
        ('Sure [as asked]: {"queries": ["a {b}"]}', ["a {b}"]),
        ('<think>maybe {"queries": ["no"]}</think>{"queries": ["a"]}', ["a"]),
        ('Here are three queries:\n1. What is a?\n2) b\n\n- "c"\n* \'tis d', ["What is a?", "b", "c", "'tis d"]),
        ("2019 revenue\nrevenue [in $]", ["2019 revenue", "revenue [in $]"]),
        ('{"queries": []}', []),
        ("", []),
        ('{"queries": ["a", "b', None),
        ('{"queries": ["a"], ', None),
        ('Here: [{"query": "a"}, {"query": "b', None),
        ('{"answer": 3}', None),
        ("[1, 2]", None),
    ],
)
def test_answers_are_read_in_the_ways_models_write_them(content: str, queries: list[str] | None) -> None:
    assert parse_answer(content) == queries


def test_empty_duplicate_and_copied_queries_are_dropped() -> None:
    left_out: Counter[str] = Counter()
    kept = choose(
        {
            "a": ["What is sold?", " - ", "what is SOLD", "Who signs", "profit of 2019"],
            "b": ["who signs?", "total net profit", "net profits"],
            "c": ["売上高は", "増えた理由"],
            "d": ["?!"],
        },
        {"a": "The profit\nof 2019, in euro", "b": "Total (net) Profit", "c": "年次報告書の売上高は百円です。"},
        left_out,
    )
    assert kept == {"a": ["What is sold?"], "b": ["net profits"], "c": ["増えた理由"]}
    assert left_out == {
        "queries: empty": 2,
        "queries: duplicates on one page": 1,
        "queries: duplicates, written for several pages": 2,
        "queries: copied from the page's text": 3,
    }


@pytest.mark.parametrize(
    ("query", "is_refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry", True),
        ("Sorry, I cannot see the image.", True),
        ("Unfortunately, I am unable to read the page.", True),
        ("As an AI model I have no eyes", True),
        ("I cannot provide queries for this page.", True),
        ("I can't log in: which number do I call?", False),
        ("What does the company apologise for?", False),
        ("sorry_state.pdf total", False),
        ("as an aid to memory", False),
    ],
)
def test_refusals_are_no_queries(query: str, is_refusal: bool) -> None:
    left_out: Counter[str] = Counter()
    assert choose({"a": [query]}, {}, left_out) == ({} if is_refusal else {"a": [query]})
    assert left_out == ({"queries: refusals": 1} if is_refusal else {})


def test_words_are_not_parts_of_words() -> None:
    kept = choose({"a": ["rate art"]}, {"a": "separate art"}, Counter())
    assert kept == {"a": ["rate art"]}
    assert words_of("\ufb01ne-tuned  Model\u2019s") == ("fine", "tuned", "model", "s")


def answer_line(page: str, *queries: str, status: int = 200) -> str:
    body = {"choices": [{"message": {"content": json.dumps(list(queries))}}]}
    error = None if status == 200 else {"code": "x", "message": "y"}
    return json.dumps({"custom_id": page, "response": {"status_code": status, "body": body}, "error": error})


WriteAnswers = Callable[..., Path]


@pytest.fixture
def write_answers(tmp_path: Path) -> WriteAnswers:
    def write(*lines: str) -> Path:
        path = tmp_path / "answers.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def samples_in(shards: tuple[Path, ...]) -> dict[str, tuple[dict[str, Any], bytes]]:
    """(JSON, page) by key."""
    samples = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}
        for name in data:
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                samples[key] = (json.loads(data[name]), data[f"{key}.png"])
    return samples


def test_the_whole_way_from_pages_to_pairs(
    tmp_path: Path, requests: list[Path], stand_in: tuple[str, StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, _ = stand_in
    answers, shard = tmp_path / "answers.jsonl", tmp_path / "corpus-000000.tar"
    list(send_requests(requests, answers, Server(endpoint)))
    out = tmp_path / "pairs"
    words = ["shards", "queries", "import", str(shard), str(answers), str(out), "--eval-fraction", "0.5"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "train: 6 pairs in 1 shard\neval: 6 pairs in 1 shard\n" in text
    assert "12 of 12 queries kept, for 6 of 6 pages" in text
    sides = [samples_in((out / f"{side}-000000.tar",)) for side in ("train", "eval")]
    assert [{json_["document"] for json_, _ in side.values()} for side in sides] in (
        [{"doc 0"}, {"doc 1"}],
        [{"doc 1"}, {"doc 0"}],
    )
    samples = sides[0] | sides[1]
    assert sorted(samples) == [f"00000{number}-p{number}" for number in range(6)]
    assert samples["000004-p4"][0]["query"] == ["What is told about 4?", "subject number 4"]
    assert [samples[key][1] for key in sorted(samples)] == [image_bytes(number) for number in range(6)]


def test_everything_left_out_is_counted(tmp_path: Path, write_answers: WriteAnswers) -> None:
    shard = write_corpus(tmp_path)
    name = "corpus-000000.tar/p{}".format
    answers = write_answers(
        answer_line(name(0), "page 0 has text", "what stands on nought"),
        answer_line(name(1), "same"),
        answer_line(name(2), "Same?"),
        answer_line(name(3), "x", status=500),
        answer_line(name(4), "x", status=500),
        answer_line(name(4), "second try", "one more"),
        answer_line("other.tar/p0", "x"),
        json.dumps({"custom_id": name(5), "response": {"status_code": 200, "body": {"choices": []}}, "error": None}),
    )
    report = import_answers([shard], [answers], tmp_path / "out")
    assert report.train_pairs == 3
    assert report.notes == ("3 of 6 queries kept, for 2 of 6 pages",)
    assert report.skipped == (
        "1 answers for pages that are not in the shards",
        "1 pages whose requests failed",
        "3 pages with answers but without a query that could be kept",
        "1 queries: copied from the page's text",
        "2 queries: duplicates, written for several pages",
    )
    samples = samples_in(report.train_shards)
    assert [json_["query"] for json_, _ in samples.values()] == ["what stands on nought", ["second try", "one more"]]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_of_pages_can_be_given(suffix: str, tmp_path: Path, write_answers: WriteAnswers) -> None:
    shard = write_corpus(tmp_path, 2, about=False)
    texts = tmp_path / f"texts.{suffix}"
    if suffix == "csv":
        texts.write_text('page,text\ncorpus-000000.tar/p0,"Net profit, 2019"\nelsewhere,x\n')
    else:
        texts.write_text(
            '{"page": "corpus-000000.tar/p0", "text": "Net profit, 2019"}\n{"page": "elsewhere", "text": "x"}\n'
        )
    answers = write_answers(
        answer_line("corpus-000000.tar/p0", "net profit 2019", "who gains"), answer_line("corpus-000000.tar/p1", "net")
    )
    report = import_answers([shard], [answers], tmp_path / "out", texts=texts)
    assert "1 queries: copied from the page's text" in report.skipped
    assert "1 texts of pages that are not in the shards" in report.skipped
    assert report.notes[1].startswith("1 pages have no known text")
    # Without documents each page is one.
    assert {json_["document"] for json_, _ in samples_in(report.train_shards).values()} == {
        "corpus-000000.tar/p0",
        "corpus-000000.tar/p1",
    }


def test_mistakes_of_an_import(tmp_path: Path, write_answers: WriteAnswers, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_corpus(tmp_path)
    out = str(tmp_path / "out")
    empty = write_answers(answer_line("corpus-000000.tar/p0", " "))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for words, message in (
        ([str(shard), str(empty), out], "no query of 1 remains for 6 pages (1 queries: empty)"),
        ([str(shard), str(tmp_path / "bad.jsonl"), out], "bad.jsonl line 1 has no custom_id"),
        ([str(shard), out], "needs shards of pages (.tar), answers (.jsonl)"),
        ([str(shard), "answers.txt", out], "answers.txt is neither a shard of pages"),
        ([str(shard), str(empty), out, "--texts", str(tmp_path / "bad.jsonl")], "bad.jsonl line 1 is not like"),
        ([str(shard), str(empty), out, "--texts", "no.csv"], "no.csv is not a file"),
    ):
        assert cli.main(["shards", "queries", "import", *words]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
