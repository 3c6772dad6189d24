"""The gallery that a run leaves: rankings of all queries, the choice of those shown, thumbnails of their pages."""

import io
import json
import math
import re
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from media_makers import video_bytes, wav_bytes
from PIL import Image
from tar_makers import STORE, index_of, pair_members, write_tar
from tiny_runs import make_inputs, run_config

from farnear.errors import RunInterruptedError
from farnear.parallel.world import World
from farnear.report.gallery import PAGES_SHOWN
from farnear.report.page import write_report
from farnear.retrieve.evaluate import RetrievalTask, build_task
from farnear.retrieve.gallery import OF_A_KIND, QUERIES_SHOWN, choose, write_gallery
from farnear.retrieve.rankings import KEPT, Rankings, rankings_of
from farnear.retrieve.thumbnail import MOST_BYTES, SIDE, thumbnail_bytes
from farnear.run_folder import RunFolder
from farnear.signals import Signals
from farnear.training.run import train_in
from farnear.training.showing import leave_gallery
from farnear.training.watch import Watch

ALONE = World(0, 1, torch.device("cpu"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def orders(task: RetrievalTask, seed: int) -> Rankings:
    """A ranking of all pages for each query, in any order."""
    generator = np.random.default_rng(seed)
    page_QP = np.stack([generator.permutation(task.pages) for _ in task.relevant])
    score_QP = np.sort(generator.random(page_QP.shape).astype(np.float32), axis=1)[:, ::-1]
    return rankings_of(page_QP, score_QP, task.relevant)


def test_ranks_are_those_of_the_first_page_that_answers() -> None:
    generator = np.random.default_rng(0)
    page_QK = np.stack([generator.permutation(60)[:40] for _ in range(30)])
    relevant = [frozenset(generator.choice(60, 1 + query % 3, replace=False).tolist()) for query in range(30)]
    rankings = rankings_of(page_QK, page_QK.astype(np.float32), relevant)
    places = [
        [page_K.index(page) + 1 for page in pages if page in page_K]
        for page_K, pages in zip(page_QK.tolist(), relevant, strict=True)
    ]
    assert rankings.rank_Q.tolist() == [min(of_query, default=0) for of_query in places]
    assert 0 in rankings.rank_Q and rankings.rank_Q.max() > KEPT
    for query, rank in enumerate(rankings.rank_Q.tolist()):
        assert rankings.right_Q[query] == (page_QK[query, rank - 1] if rank else min(relevant[query]))
    assert rankings.page_Qk.shape == (30, KEPT) and rankings.looked_at == 40


def test_what_is_shown_says_something_honest() -> None:
    generator = np.random.default_rng(1)
    earlier, hashes = generator.integers(0, 50, 500), generator.integers(0, 2**62, 500)
    now = np.where(generator.random(500) < 0.5, earlier, generator.integers(0, 50, 500))
    now[::3] = 1
    why = choose(now, earlier, hashes)
    gain = np.array([(1 / n if n else 0) - (1 / e if e else 0) for n, e in zip(now, earlier, strict=True)])
    of = {name: [query for query, names in why.items() if name in names] for names in why.values() for name in names}
    assert {name: len(queries) for name, queries in of.items() if name != "random sample"} == dict.fromkeys(
        ("gained most", "lost most", "still wrong"), OF_A_KIND
    )
    assert len(why) == QUERIES_SHOWN
    assert sorted(gain[of["gained most"]]) == sorted(np.sort(gain)[-OF_A_KIND:])
    assert sorted(gain[of["lost most"]]) == sorted(np.sort(gain)[:OF_A_KIND])
    assert all(now[query] != 1 and earlier[query] != 1 for query in of["still wrong"])
    assert (now[of["still wrong"]] == 0).sum() == min(OF_A_KIND, ((now == 0) & (earlier != 1)).sum())
    # The sample does not depend on what has become of its queries, nor on the order in which they stand.
    others = choose(generator.permutation(now), generator.permutation(earlier), hashes)
    drawn = [{query for query, names in one.items() if "random sample" in names} for one in (why, others)]
    assert len(drawn[0] & drawn[1]) >= OF_A_KIND
    order = generator.permutation(500)
    moved = choose(now[order], earlier[order], hashes[order])
    assert {order[query] for query in moved} == why.keys()


def test_a_choice_without_rankings_before_and_of_few_queries() -> None:
    ranks, hashes = np.array([1, 0, 3, 1, 9] * 40), np.arange(200)
    why = choose(ranks, None, hashes)
    wrong = [query for query, names in why.items() if "wrong" in names]
    assert len(why) == QUERIES_SHOWN and len(wrong) == OF_A_KIND
    assert all(ranks[query] == 0 for query in wrong)
    few = choose(ranks[:7], ranks[1:8], hashes[:7])
    assert list(few) == list(range(7)) and all("random sample" in names for names in few.values())


def jpeg(width: int, height: int, orientation: int) -> bytes:
    """Red left of blue, said to be turned."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def asks(key: str, query: str) -> tuple[str, bytes]:
    return f"{key}.json", json.dumps({"query": query}).encode()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    """An evaluation of every kind of input; the page of "broken" breaks off in the middle."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "chat   with a page"}]}]
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    members = [
        *[asks("turned", "a turned page"), ("turned.jpg", jpeg(800, 400, 6))],
        *[asks("words", "a text"), ("words.txt", ("a text \n of many words " * 50).encode())],
        *[asks("sound", "a sound"), ("sound.wav", wav_bytes())],
        *[asks("film", "a film"), ("film.mp4", video_bytes())],
        *[asks("chat", "a chat"), ("chat.messages.json", json.dumps(messages).encode())],
        ("chat.png", png(Image.new("RGB", (30, 40), "green"))),
        *[asks("both", "a page with words"), ("both.png", png(Image.new("RGBA", (90, 40), (9, 9, 9, 0))))],
        ("both.txt", b"beside it"),
        *[("seen.query.png", png(Image.new("L", (40, 60), 200))), ("seen.png", png(Image.fromarray(noise)))],
        *[asks("broken", "a broken page"), ("broken.png", png(Image.fromarray(noise[:150]))[:9000])],
    ]
    shard = write_tar(tmp_path_factory.mktemp("mixed") / "eval-0.tar", members)
    return build_task(index_of([shard]), STORE)


@pytest.fixture(scope="module")
def of_all_kinds(mixed: RetrievalTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    write_gallery(folder, mixed, orders(mixed, 0), "before", 0)
    return folder


def test_the_rankings_of_all_queries_are_kept(mixed: RetrievalTask, of_all_kinds: Path) -> None:
    head, *queries = lines(of_all_kinds / "before.jsonl")
    assert head == {
        "kind": "before",
        "step": 0,
        "fingerprint": mixed.fingerprint,
        "queries": 8,
        "pages": 8,
        "looked_at": 8,
    }
    of = {query["key"].partition("/")[2]: query for query in queries}
    assert of["words"]["query"] == "a text" and of["seen"]["query"] == ""
    for query, relevant in zip(queries, mixed.relevant, strict=True):
        assert sorted(query["pages"]) == list(range(8)) and query["scores"] == sorted(query["scores"], reverse=True)
        assert query["hits"] == [query["rank"]] and query["right"] == query["pages"][query["rank"] - 1]
        assert {query["right"]} == relevant
        # Names say which page a position is: a query's own bears its key.
        assert query["names"][query["rank"] - 1].startswith(f"{query['key']}.")


def test_every_kind_of_page_has_something_to_show(of_all_kinds: Path) -> None:
    shown = json.loads((of_all_kinds / "before-shown.json").read_text())
    cards = {re.search(r"/(\w+)\.", card["name"])[1]: card for card in shown["pages"].values()}
    kinds = {key: card["kind"] for key, card in cards.items()}
    assert kinds == dict.fromkeys(("turned", "seen", "broken"), "image") | {
        "words": "text",
        "sound": "audio",
        "film": "video",
        "chat": "image+message",
        "both": "image+text",
    }
    assert cards["words"]["words"].startswith("a text of many words a text of") and len(cards["words"]["words"]) == 300
    assert cards["chat"]["words"] == "chat with a page" and cards["both"]["words"] == "beside it"
    assert {key for key, card in cards.items() if "picture" in card} == {"turned", "chat", "both", "seen"}
    assert cards["broken"]["fault"].startswith("cannot be decoded (") and "/" not in cards["broken"]["fault"]
    thumbnails = {}
    for key in ("turned", "chat", "both", "seen"):
        card, path = cards[key], of_all_kinds / "thumbnails" / cards[key]["picture"]
        assert path.stat().st_size <= MOST_BYTES
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (card["width"], card["height"]))
            thumbnails[key] = image.copy()
    # A quarter turn to the right: what was left is above, and what was wide is high. Nothing small is made larger.
    assert thumbnails["turned"].size == (SIDE // 2, SIDE) and thumbnails["chat"].size == (30, 40)
    top, bottom = (thumbnails["turned"].getpixel((50, y)) for y in (20, 180))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]
    assert min(thumbnails["both"].getpixel((5, 5))) > 240, "what is transparent is white"
    asked = {query["line"]: query for query in shown["queries"]}
    seen = next(
        asked[line] for line, query in enumerate(lines(of_all_kinds / "before.jsonl")[1:]) if not query["query"]
    )
    assert (seen["kind"], seen["width"], seen["height"]) == ("image", 40, 60)
    files = {path.name for path in (of_all_kinds / "thumbnails").iterdir()}
    assert files == {card["picture"] for card in [*cards.values(), *asked.values()] if "picture" in card}


def test_a_thumbnail_is_bounded_whatever_it_shows() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    data = thumbnail_bytes(noise)
    assert len(data) <= MOST_BYTES
    # Both rankings' pages, the right one and a picture of the query, in base64, leave room for words in 5 MB.
    assert QUERIES_SHOWN * (2 * PAGES_SHOWN + 2) * MOST_BYTES * 4 / 3 < 4.4e6
    assert Image.open(io.BytesIO(data)).width > 40
    plain = thumbnail_bytes(Image.new("RGB", (SIDE, SIDE), "white"))
    assert Image.open(io.BytesIO(plain)).size == (SIDE, SIDE)


def task_of(path: Path, pairs: int, first: int = 0) -> RetrievalTask:
    members = [pair_members(f"k{pair}", f"query {pair}", pair) for pair in range(first, first + pairs)]
    return build_task(index_of([write_tar(path, [one for of_pair in members for one in of_pair])]), STORE)


def test_rankings_of_another_task_are_not_compared(tmp_path: Path) -> None:
    task, other = task_of(tmp_path / "a.tar", 100), task_of(tmp_path / "b.tar", 100, first=1)
    assert task.fingerprint != other.fingerprint
    folder = tmp_path / "gallery"
    write_gallery(folder, task, orders(task, 0), "before", 0)
    write_gallery(folder, task, orders(task, 1), "after", 9)
    reasons = {
        why for query in json.loads((folder / "after-shown.json").read_text())["queries"] for why in query["why"]
    }
    assert reasons == {"gained most", "lost most", "still wrong", "random sample"}
    write_gallery(folder, other, orders(other, 1), "after", 9)
    shown = json.loads((folder / "after-shown.json").read_text())["queries"]
    assert {why for query in shown for why in query["why"]} == {"wrong", "random sample"}
    assert len(shown) == QUERIES_SHOWN
    files = {path.name for path in (folder / "thumbnails").iterdir()}
    assert len(files) == 101, "those of both tasks"
    write_gallery(folder, task, orders(task, 1), "after", 9)
    left = {path.name for path in (folder / "thumbnails").iterdir()}
    assert left < files, "what nothing names any more goes"


def test_a_gallery_that_cannot_be_written_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, run = task_of(tmp_path / "a.tar", 5), RunFolder(tmp_path / "run")
    leave_gallery(run, task, orders(task, 0), "before", 0, lambda: None)
    kept = {path: path.read_bytes() for path in run.gallery.rglob("*.*")}
    with patch("farnear.files.os.replace", side_effect=OSError(28, "No space left on device")):
        leave_gallery(run, task, orders(task, 1), "after", 4, lambda: None)
    assert (
        "the report shows of the queries could not be written: OSError: [Errno 28] No space" in capsys.readouterr().out
    )
    assert {path: path.read_bytes() for path in run.gallery.rglob("*.*")} == kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("runs"))


def config_of(folder: Path, name: str, **keys: Any) -> Any:
    return run_config(
        folder, name, data={"eval": str(folder / "data" / "eval-*.tar")}, training={"max_steps": 3}, **keys
    )


def ndcg_of(path: Path) -> float:
    """nDCG@10 by the rankings, for queries with one right page."""
    _, *queries = lines(path)
    return sum(1 / math.log2(query["rank"] + 1) for query in queries if query["rank"] and query["rank"] <= 10) / len(
        queries
    )


def test_a_run_shows_where_it_stands_however_it_ends(folder: Path) -> None:
    """Stopped by a signal after step 2, failed at step 3, and finished in a third go."""
    config, run, signals = config_of(folder, "run"), RunFolder(folder / "run"), Signals()

    def at(watch: Watch, phase: str, **places: Any) -> None:
        real_at(watch, phase, **places)
        if phase == "update" and watch.place.step == 2:
            signals.first = signal.SIGTERM

    real_at = Watch.at
    with patch.object(Watch, "at", at), pytest.raises(RunInterruptedError):
        train_in(ALONE, config, None, signals)
    page = run.report.read_text()
    assert re.search(r"stopped \d{4}-\d\d-\d\d \d\d:\d\d UTC: stopped by SIGTERM at rank 0 after step 2", page)
    assert "before training" in page and "after training</h4>" not in page
    before = {path: path.stat().st_mtime_ns for path in run.gallery.rglob("*.*")}
    assert {path.name for path in before if path.parent == run.gallery} == {"before.jsonl", "before-shown.json"}
    with (
        patch("farnear.training.loop.train_step", side_effect=ZeroDivisionError("by none")),
        pytest.raises(ZeroDivisionError),
    ):
        train_in(ALONE, config, "newest")
    assert "UTC: rank 0: ZeroDivisionError: by none" in run.report.read_text()
    train_in(ALONE, config, "newest")
    page = run.report.read_text()
    assert "finished " in page and "after training</h4>" in page
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was before training stays"
    measures = {line["kind"]: line["metrics"]["64"]["ndcg@10"] for line in lines(run.evaluations)}
    assert {kind: ndcg_of(run.gallery / f"{kind}.jsonl") for kind in measures} == pytest.approx(measures)
    # Taken up again before its last step, a run is no longer one that has ended.
    with patch("farnear.training.run.train", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        train_in(ALONE, config, "newest")
    assert {path.name for path in run.gallery.iterdir()} == {"before.jsonl", "before-shown.json", "thumbnails"}
    assert "after training</h4>" not in run.report.read_text()


def test_no_report_is_worth_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = config_of(folder, "mute"), RunFolder(folder / "mute")
    with (
        patch("farnear.training.showing.write_report", side_effect=ValueError("no words")),
        patch("farnear.training.showing.write_gallery", side_effect=MemoryError("too large")),
    ):
        train_in(ALONE, config)
    told = capsys.readouterr().out
    assert f"{run.report} could not be written: ValueError: no words; `farnear report {run.path}` writes it" in told
    assert "could not be written: MemoryError: too large" in told
    assert json.loads(run.status.read_text())["state"] == "finished" and run.summary.exists()
    assert not run.report.exists()
    assert write_report(run.path).exists()


def test_a_run_that_starts_over_starts_a_new_gallery(folder: Path) -> None:
    config, run = config_of(folder, "over"), RunFolder(folder / "over")
    with patch("farnear.training.run.train", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        train_in(ALONE, config)
    (run.gallery / "after.jsonl").write_text("of a run that is gone")
    with patch("farnear.training.run.measure", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        train_in(ALONE, config)
    assert not run.gallery.exists()
