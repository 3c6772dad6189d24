"""The reader: the input of any row in sentence-transformers' forms, or an error that names shard and member."""

import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_makers import video_bytes, wav_bytes
from object_stores import object_server
from PIL import Image
from tar_makers import STORE, Members, image_bytes, index_of, number_of_image, pair_members, write_pairs, write_tar

from farnear.data import media, shard_store
from farnear.data.index import open_index, write_index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.read import BadInputError, InputReader
from farnear.data.remote import Patience
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError

GREY_16 = np.full((4, 6), 0x80FF, np.uint16)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reader_of(path: Path, members: Members) -> InputReader:
    index = index_of([write_tar(path / "a.tar", members)])
    assert not index.faults, index.faults
    return InputReader(index, STORE)


def page_of(path: Path, data: bytes, name: str = "k.png") -> Any:
    reader = reader_of(path, [("k.query.txt", b"q"), (name, data)])
    return reader[reader.index.positives[0]]


def test_queries_and_pages_of_all_rows(tmp_path: Path) -> None:
    write_index(index_of(write_pairs(tmp_path, 12, 3, negatives_of_pair=2)), tmp_path / "index.arrow")
    index = open_index(tmp_path / "index.arrow")
    reader = InputReader(index, STORE)
    for pair in (7, 0, 11, 5, *range(12)):
        assert reader[index.query_N[pair]] == f"query {pair}"
        assert [number_of_image(reader[row]) for row in index.positives_of(pair)] == [pair]
        expected = [10_000 + pair * 10 + number for number in range(pair % 3)]
        assert [number_of_image(reader[row]) for row in index.negatives_of(pair)] == expected
    reader.close()
    assert reader[index.query_N[3]] == "query 3"


def test_queries_of_every_form(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Find the page."},
        {"role": "user", "content": [{"type": "text", "text": "like this"}, {"type": "image"}]},
    ]
    members: Members = [
        *pair_members("a", " spaced\n", 1),
        ("b.query.txt", "\ufeff größe \r\n".encode()),
        ("b.png", image_bytes(2)),
        ("c.json", json.dumps({"query": ["one ", "two"]}).encode()),
        ("c.png", image_bytes(3)),
        ("d.json", json.dumps({"query": chat}).encode()),
        ("d.query.png", image_bytes(4)),
        ("d.png", image_bytes(5)),
        ("e.query.jpg", image_bytes(6, "JPEG")),
        ("e.query.txt", b"words"),
        ("e.txt", b" a text for a page"),
    ]
    reader = reader_of(tmp_path, members)
    queries = [reader[row] for row in reader.index.query_N]
    assert queries[:4] == ["spaced", "größe", "one", "two"]
    assert number_of_image(queries[4][1]["content"][1].pop("image")) == 4
    assert queries[4] == chat
    assert set(queries[5]) == {"text", "image"} and queries[5]["text"] == "words"
    assert isinstance(queries[5]["image"], Image.Image)
    assert reader[reader.index.positives_of(5)[0]] == "a text for a page"


def test_audio(tmp_path: Path) -> None:
    audio = page_of(tmp_path, wav_bytes(), "k.wav")
    assert set(audio) == {"audio"} and audio["audio"]["sampling_rate"] == 8000
    array = audio["audio"]["array"]
    assert array.dtype == np.float32 and array.shape == (800,)
    assert np.allclose(array, 0.25, atol=0.01)  # half of a channel at 0.5, the other silent


def test_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_bytes(frames=6, rate=4)  # every second frame is kept
    video = page_of(tmp_path, data, "k.mp4")["video"]
    assert video["array"].shape == (3, 16, 32, 3) and video["array"].dtype == np.uint8
    assert np.abs(video["array"].mean(axis=(1, 2, 3)) - [0, 80, 160]).max() < 12
    # As of a film of these three: a model's processor takes frames by them.
    metadata = {"fps": 2.0, "total_num_frames": 3, "duration": 1.5, "frames_indices": [0, 1, 2]}
    assert video["video_metadata"] == metadata
    monkeypatch.setattr(media, "MAX_FRAMES", 2)
    video = page_of(tmp_path, data, "k.mp4")["video"]
    assert np.abs(video["array"].mean(axis=(1, 2, 3)) - [0, 160]).max() < 12
    assert video["video_metadata"] == {**metadata, "fps": 1.0, "total_num_frames": 2, "frames_indices": [0, 1]}


def test_several_media_and_messages_with_them(tmp_path: Path) -> None:
    parts: Members = [("k.txt", b"caption"), ("k.png", image_bytes(1)), ("k.wav", wav_bytes())]
    reader = reader_of(tmp_path, [("k.query.txt", b"q"), *parts])
    value = reader[reader.index.positives[0]]
    assert list(value) == ["text", "image", "audio"] and value["text"] == "caption"
    messages = [{"role": "user", "content": [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "x"}]}]
    chat: Members = [("k.messages.json", json.dumps(messages).encode()), *parts[1:]]
    reader = reader_of(tmp_path, [("k.query.txt", b"q"), *chat])
    content = reader[reader.index.positives[0]][0]["content"]
    assert content[0]["audio"]["sampling_rate"] == 8000 and number_of_image(content[1]["image"]) == 1
    assert content[2] == {"type": "text", "text": "x"}


half_red = Image.new("RGBA", (6, 4), (255, 0, 0, 128))
palette = Image.new("P", (6, 4), 1)
palette.putpalette([0, 0, 0, 10, 20, 30])
PAGES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "rgb": (encode(Image.new("RGB", (6, 4), (1, 2, 3))), (1, 2, 3)),
    "grey": (encode(Image.new("L", (6, 4), 9)), (9, 9, 9)),
    "one bit": (encode(Image.new("1", (6, 4), 1)), (255, 255, 255)),
    "16-bit grey": (encode(Image.fromarray(GREY_16)), (128, 128, 128)),
    "palette": (encode(palette), (10, 20, 30)),
    "palette with transparency": (encode(palette, transparency=1), (255, 255, 255)),
    "colour key": (encode(Image.new("RGB", (6, 4), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "alpha": (encode(half_red), (255, 127, 127)),
    "grey with alpha": (encode(Image.new("LA", (6, 4), (0, 0))), (255, 255, 255)),
    "webp with alpha": (encode(half_red, "WEBP", lossless=True), (255, 127, 127)),
    "cmyk": (encode(Image.new("CMYK", (6, 4), (0, 0, 0, 255)), "JPEG", quality=100), (0, 0, 0)),
}


@pytest.mark.parametrize("kind", PAGES)
def test_every_mode_becomes_rgb(tmp_path: Path, kind: str) -> None:
    data, colour = PAGES[kind]
    page = page_of(tmp_path, data)
    assert page.mode == "RGB" and page.size == (6, 4)
    assert np.abs(np.array(page.getpixel((2, 2))) - colour).max() <= 1


def test_exif_does_not_rotate_the_page(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    page = page_of(tmp_path, encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif), "k.jpg")
    assert page.size == (6, 4) and not page.getexif()


noise = Image.frombytes("RGB", (40, 40), random.Random(0).randbytes(4800))
BROKEN = {
    "cut PNG": (encode(noise)[:-400], "k.png", "truncated"),
    "cut JPEG": (encode(noise, "JPEG")[:-400], "k.jpg", "truncated"),
    "no sound": (b"nothing", "k.wav", "Invalid data"),
    "no film": (b"nothing", "k.mp4", "Invalid data"),
    "a sound for a film": (wav_bytes(), "k.mp4", "it has no video"),
    "a film without sound": (video_bytes(), "k.flac", "it has no audio"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_page_names_shard_and_member(tmp_path: Path, kind: str) -> None:
    data, name, reason = BROKEN[kind]
    message = rf"the member '{name}' in shard .*a\.tar cannot be decoded \(.*{reason}.*so its pair cannot be used"
    with pytest.raises(BadInputError, match=message) as error:
        page_of(tmp_path, data, name)
    assert "\n" not in str(error.value)
    assert error.value.reason.startswith("cannot be decoded")
    copied = pickle.loads(pickle.dumps(error.value))
    assert (str(copied), copied.reason) == (str(error.value), error.value.reason)


def test_bytes_that_changed_after_the_index_are_refused(tmp_path: Path) -> None:
    (shard,) = write_pairs(tmp_path, 2, 1)
    reader = InputReader(index_of([shard]), STORE)
    index = reader.index
    assert reader[index.query_N[1]] == "query 1"
    shard.write_bytes(shard.read_bytes().replace(b"query 1", b"query 7"))
    with pytest.raises(BadInputError, match=r"'k00001.json' in shard .*part-000.tar has other bytes than when"):
        reader[index.query_N[1]]
    assert reader[index.query_N[0]] == "query 0"


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 4, 2)
    reader = InputReader(index_of(shards), STORE)
    query_N = reader.index.query_N
    assert reader[query_N[0]] == "query 0"
    size = shards[1].stat().st_size
    with shards[1].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=rf"part-001.tar has {size + 512} bytes and its index says {size}.*start again"):
        reader[query_N[3]]
    os.truncate(shards[0], 600)  # under the open file
    with pytest.raises(UserError, match=r"part-000.tar ends at byte \d+ and its index says"):
        reader[reader.index.positives[0]]
    shards[1].unlink()
    with pytest.raises(UserError, match=r"part-001.tar cannot be read \(No such file"):
        reader[query_N[3]]


def open_files_below(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [target for target in targets if target.startswith(str(folder))]


def test_open_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_store, "_OPEN_SHARDS", 3)
    reader = InputReader(index_of(write_pairs(tmp_path, 6, 6)), STORE)
    assert open_files_below(tmp_path) == []
    for pair in (0, 1, 2, 0, 3, 4):
        reader[reader.index.query_N[pair]]
    assert sorted(Path(name).name for name in open_files_below(tmp_path)) == [f"part-00{i}.tar" for i in (0, 3, 4)]
    reader.close()
    assert open_files_below(tmp_path) == []


def test_a_worker_process_opens_its_own(tmp_path: Path) -> None:
    write_index(index_of(write_pairs(tmp_path, 2, 1)), tmp_path / "index.arrow")
    reader = InputReader(open_index(tmp_path / "index.arrow"), STORE)
    row = reader.index.query_N[1]
    assert reader[row] == "query 1"
    sent = pickle.dumps(reader)
    # The index travels as the name of its file, whatever its size.
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert len(open_files_below(tmp_path)) - 1 <= 2  # the shard once, and maps of the index
    assert there[row] == "query 1"
    assert there.index.fingerprint == reader.index.fingerprint
    in_memory = InputReader(index_of(sorted(tmp_path.glob("*.tar"))), STORE)
    assert pickle.loads(pickle.dumps(in_memory))[row] == "query 1"


def test_a_spoilt_copy_of_a_shard_is_fetched_again(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path / "data", 4, 1)
    with object_server() as server:
        url = server.put("a.tar", shards[0].read_bytes())
        cache = ShardCache(tmp_path / "cache", patience=Patience(attempts=2, seconds_first_wait=0.01))
        store = ShardStore(cache)
        set_of_one = ShardSet((SourceShards("s", (url,)),))
        index = cached_index(set_of_one, tmp_path / "cache", store)
        (copy,) = (path for path in cache.folder.iterdir() if path.name.startswith("a.tar"))
        copy.chmod(0o644)
        copy.write_bytes(bytes(copy.stat().st_size))
        reader = InputReader(index, store)
        assert [reader[row] for row in index.query_N.tolist()] == [f"query {pair}" for pair in range(4)]
        assert len(server.gets("a.tar")) == 2
        # Once is enough: a shard that is wrong where it comes from must not be fetched for each of its pairs.
        reader.close()
        copy.chmod(0o644)
        copy.write_bytes(bytes(copy.stat().st_size))
        with pytest.raises(BadInputError, match="has other bytes than when it was indexed"):
            reader[int(index.query_N[0])]
        assert len(server.gets("a.tar")) == 2
        # What is wrong where it comes from stays wrong, and is said to be.
        server.put("a.tar", bytes(shards[0].stat().st_size))
        copy.unlink()
        reader.close()
        with pytest.raises(UserError):
            reader[int(index.query_N[0])]
        reader.close()


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    """Members are read where they lie; nothing is unpacked, so no name makes a file."""
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    names = ("../../evil", f"{tmp_path}/evil", "a/../../../evil")
    page = encode(Image.new("RGB", (6, 4), (1, 2, 3)))
    ends = {".query.txt": b"q", ".png": page}
    members = [(f"{name}{i}{end}", data) for i, name in enumerate(names) for end, data in ends.items()]
    shard = write_tar(folder / "x.tar", members)
    index = index_of([shard])
    reader = InputReader(index, STORE)
    assert [reader[int(row)].size for row in index.positives] == [(6, 4)] * len(names)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [shard]
