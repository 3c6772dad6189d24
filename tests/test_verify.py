"""What `farnear shards verify` and `farnear shards inspect` find out."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from media_makers import video_bytes, wav_bytes
from PIL import Image
from tar_makers import STORE, Members, image_bytes, index_of, pair_members, write_pairs, write_tar
from test_index import CORPUS, LARGE, reference
from test_index_cache import set_of

from farnear.data import verify
from farnear.data.faults import Fault
from farnear.data.index_cache import cached_index
from farnear.data.summary import summary_text
from farnear.data.verify import verify_shards


def noise(seed: int) -> bytes:
    image = Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(3 * 64 * 64))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def told(faults: tuple[Fault, ...]) -> list[tuple[str, str, int]]:
    return [(Path(fault.shard).name, fault.kind, fault.pairs_lost) for fault in faults]


def change_unseen(shard: Path, old: bytes, new: bytes) -> None:
    """Other bytes, but size and time of change stay: a disk that forgets."""
    status = shard.stat()
    data = shard.read_bytes()
    assert data.count(old) == 1 and len(new) == len(old)
    shard.write_bytes(data.replace(old, new))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_shards_have_no_faults(tmp_path: Path, processes: int) -> None:
    shards = write_pairs(tmp_path, 9, 3, negatives_of_pair=2)
    corpus = [write_tar(tmp_path / "corpus.tar", CORPUS)]
    found = verify_shards(set_of(shards, corpus=corpus), tmp_path / "cache", STORE, processes=processes)
    index, faults = found.index, found.faults
    assert len(index) == 9 and faults == () and index.faults == ()


@pytest.mark.parametrize("processes", [1, 2])
def test_bytes_that_changed_are_found(tmp_path: Path, processes: int) -> None:
    shards = write_pairs(tmp_path, 9, 3, negatives_of_pair=1)
    shard_set, cache = set_of(shards), tmp_path / "cache"
    cached_index(shard_set, cache, STORE)
    change_unseen(shards[0], b"query 2", b"query 7")
    change_unseen(shards[2], b"k00007.neg0.png", b"k00007.neg9.png")  # the header's checksum is wrong now
    change_unseen(shards[2], b'{"query": "query 8"}', b'{"query": "query 9"}')
    found = verify_shards(shard_set, cache, STORE, processes=processes)
    index, faults = found.index, found.faults
    assert told(faults) == [
        ("part-000.tar", "changed", 1),
        ("part-002.tar", "damaged_header", 0),
        ("part-002.tar", "changed", 1),
    ]
    assert "'k00002.json' has other bytes than when it was indexed" in faults[0].detail
    assert index.faults == ()


def test_images_that_cannot_be_decoded_are_found(tmp_path: Path) -> None:
    first, second, third = (noise(number)[:-200] for number in range(3))
    members: Members = [
        *pair_members("a", "q", 1),
        ("b.json", json.dumps({"query": ["one", "two"]}).encode()),
        ("b.jpg", first),
        ("b.neg0.jpg", second),
        *pair_members("c", "q", 3),
        ("c.neg0.jpg", third),
        reference("d", pos_id="bad", neg_ids=["doc1"]),
        reference("e", pos_id="doc1", neg_ids=["bad"]),
    ]
    pairs = write_tar(tmp_path / "a.tar", members)
    corpus = write_tar(tmp_path / "corpus.tar", [*CORPUS, ("bad.jpg", first), ("large.png", LARGE)])
    shard_set = set_of([pairs], corpus=[corpus], max_image_pixels=64 * 64)
    found = verify_shards(shard_set, tmp_path / "cache", STORE)
    index, faults = found.index, found.faults
    assert told(faults) == [
        ("a.tar", "undecodable", 2),
        ("a.tar", "undecodable", 0),  # its pairs are counted already
        ("a.tar", "undecodable", 1),
        ("corpus.tar", "undecodable", 2),
    ]
    assert "'b.jpg': image file is truncated" in faults[0].detail
    assert [fault.kind for fault in index.faults] == ["too_many_pixels"]  # which is not decoded


def test_a_shard_in_two_uses_is_verified_once(tmp_path: Path) -> None:
    (shard,) = write_pairs(tmp_path, 3, 1)
    shard_set, cache = set_of([shard], corpus=[shard]), tmp_path / "cache"
    cached_index(shard_set, cache, STORE)
    page = image_bytes(1)
    change_unseen(shard, page, page[:-1] + b"x")
    found = verify_shards(shard_set, cache, STORE)
    faults = found.faults
    assert told(faults) == [("part-000.tar", "changed", 1)]
    assert found.lost == (1,)


def test_what_only_excluded_pairs_use_is_left_alone(tmp_path: Path) -> None:
    shards, cache = write_pairs(tmp_path, 9, 3), tmp_path / "cache"
    cached_index(set_of(shards), cache, STORE)
    change_unseen(shards[0], b"query 2", b"query 7")
    found = verify_shards(set_of(shards), cache, STORE)
    (lost,) = found.lost
    bad = (found.index.shards[found.index.pair_shard_N[lost]], found.index.pair_key[lost])
    assert bad == (str(shards[0]), "k00002")
    assert verify_shards(set_of(shards, exclude=(bad,)), cache, STORE).faults == ()


def test_known_damage_is_not_told_twice(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 6, 2)
    shards[1].write_bytes(shards[1].read_bytes()[: 4 * 1024 + 100])
    found = verify_shards(set_of(shards), tmp_path / "cache", STORE)
    index, faults = found.index, found.faults
    assert faults == () and len(index.faults) == 2


def test_every_image_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(verify, "decode_image", decoded.append)
    shards = write_pairs(tmp_path, 4, 2, negatives_of_pair=1)
    verify_shards(set_of(shards), tmp_path / "cache", STORE)
    assert sorted(decoded) == sorted(image_bytes(number) for number in (0, 1, 2, 3, 10_010, 10_030))


def summary(*sources: Any, **keys: Any) -> str:
    return summary_text(index_of(*sources, **keys), STORE)


def line(text: str, name: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(name + "  ")]
    return found.removeprefix(name).strip()


def test_a_summary_of_inline_pairs(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path / "a", 8, 2, negatives_of_pair=2, copies_of_page=2)
    more = write_pairs(tmp_path / "b", 3, 1)
    text = summary(shards, more)
    assert line(text, "pairs") == "11 (s0 8, s1 3)"
    assert line(text, "shards").startswith("3 of pairs, ")
    assert line(text, "queries") == "text 11"
    assert line(text, "positives") == "image 11"
    assert line(text, "negatives") == "image 7"
    assert line(text, "corpus") == "none"
    assert line(text, "page sizes") == "18 images, 5 %: 6 x 4, 50 %: 6 x 4, 95 %: 6 x 4, 100 %: 6 x 4"
    assert line(text, "negatives a pair") == "0 to 2, median 0, mean 0.64"
    # In the first source pair i has page i // 2, in the second page i: "query 1" has the pages 0 and 1.
    assert line(text, "positives a query") == "1 to 2, median 1, mean 1.25"
    assert line(text, "queries a page") == "2 to 3, median 2, mean 2.50"
    assert line(text, "repeated queries") == "3 are asked by more than one pair (6 pairs)"
    assert line(text, "repeated pages") == "4 are stored more than once (11 copies)"
    assert line(text, "ignored members") == "none" and line(text, "faults") == "none"
    # Both sources have a shard of this name.
    first = f"{shards[0]}/k00002"
    assert f"pair {first}\n  query     query 2\n  positive  {first}.png: image of 6 x 4" in text
    assert text.count("  negative  ") == 3


def test_a_summary_of_sizes(tmp_path: Path) -> None:
    sizes = [(10 * number, 20) for number in range(1, 101)]
    corpus = [(f"d{number}.png", image_bytes(number, "PNG", size)) for number, size in enumerate(sizes)]
    pairs = write_tar(tmp_path / "a.tar", [reference("k", pos_id="d0", neg_ids=["d5"])])
    text = summary([pairs], corpus=[write_tar(tmp_path / "corpus.tar", corpus)])
    assert line(text, "shards").startswith("1 of pairs and 1 of documents, ")
    expected = "100 images, 5 %: 60 x 20, 50 %: 510 x 20, 95 %: 950 x 20, 100 %: 1000 x 20"
    assert line(text, "page sizes") == expected
    assert line(text, "corpus") == "image 100" and line(text, "negatives a pair") == "1"


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    members = [*pair_members("a\x1b[2J", "up\x1b[A \u202egnp", 1), ("b\x07.cls", b"1"), ("c\x1b.png", image_bytes(3))]
    text = summary([write_tar(tmp_path / "a.tar", members)])
    assert not set(text) & set("\x1b\x07\u202e")
    assert r"pair a.tar/a\x1b[2J" in text and r"up\x1b[A \u202egnp" in text and r"such as a.tar/b\x07.cls" in text


def test_a_summary_of_what_is_left_out(tmp_path: Path) -> None:
    members = [*pair_members("a", "q", 1), *pair_members("b", "q", 2), ("b.cls", b"1"), ("c.png", image_bytes(3))]
    shard = write_tar(tmp_path / "a.tar", members)
    text = summary([shard], exclude=[(str(shard), "b")])
    assert line(text, "left out") == "1 pair by data.exclude"
    assert line(text, "ignored members") == "1 member such as a.tar/b.cls"
    assert line(text, "faults") == "1, which cost at least 1 pair"
    assert "'c' has no query" in text
    assert summary_text(index_of([tmp_path / "a.tar"]), STORE, first_pairs=0).count("pair a.tar") == 0


def test_a_summary_of_every_modality(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]}]
    members: Members = [
        ("a.query.wav", wav_bytes(0.5)),
        ("a.mp4", video_bytes()),
        ("b.json", json.dumps({"query": chat}).encode()),
        ("b.query.png", image_bytes(1)),
        ("b.png", image_bytes(2)),
        ("b.txt", b"a caption"),
        ("c.query.txt", b"x" * 500),
        ("c.jpg", noise(1)[:-200]),
    ]
    text = summary([write_tar(tmp_path / "a.tar", members)])
    assert line(text, "queries") == "text 1, audio 1, image+message 1"
    assert "query     audio of 0.5 s at 8,000 Hz" in text
    assert "positive  a.tar/a.mp4: video of 1.5 s, 3 frames of 32 x 16" in text
    assert "query     user: look, image of 6 x 4" in text
    assert "positive  a.tar/b.txt: a caption, image of 6 x 4" in text
    assert "x" * 159 + "…" in text and "x" * 161 not in text
    assert "positive  a.tar/c.jpg: (cannot be decoded" in text
