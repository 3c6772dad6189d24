"""The reader: the text and the RGB page of any row, or an error that names the shard."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tar_makers import Members, number_of_image, pair_members, write_pairs, write_tar

from farnear.data import read as read_module
from farnear.data.index import build_index, open_index, write_index
from farnear.data.read import PairReader
from farnear.errors import UserError

GREY_16 = np.full((4, 6), 0x80FF, np.uint16)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reader_of(path: Path, image: bytes, name: str = "k.png") -> PairReader:
    return PairReader(build_index([write_tar(path / "a.tar", [("k.query.txt", b"q"), (name, image)])]))


def test_queries_and_pages_of_all_rows(tmp_path: Path) -> None:
    index = build_index(write_pairs(tmp_path, 12, 3, negatives_of_pair=2))
    write_index(index, tmp_path / "index.arrow")
    index = open_index(tmp_path / "index.arrow")
    reader = PairReader(index)
    for pair in (7, 0, 11, 5, *range(12)):
        assert reader.query(pair) == f"query {pair}"
        assert number_of_image(reader.page(index.positive_N[pair])) == pair
        hard = index.negatives[index.negative_start_N1[pair] : index.negative_start_N1[pair + 1]]
        expected = [10_000 + pair * 10 + number for number in range(pair % 3)]
        assert [number_of_image(reader.page(row)) for row in hard] == expected
    reader.close()
    assert reader.query(3) == "query 3"


def test_text_files_and_white_space(tmp_path: Path) -> None:
    members: Members = pair_members("a", " spaced\n", 1)
    members += [("b.query.txt", "\ufeff größe \r\n".encode()), pair_members("b", "", 2)[1]]
    reader = PairReader(build_index([write_tar(tmp_path / "a.tar", members)]))
    assert [reader.query(0), reader.query(1)] == ["spaced", "größe"]


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
    page = reader_of(tmp_path, data).page(0)
    assert page.mode == "RGB" and page.size == (6, 4)
    assert np.abs(np.array(page.getpixel((2, 2))) - colour).max() <= 1


def test_exif_does_not_rotate_the_page(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    page = reader_of(tmp_path, encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif), "k.jpg").page(0)
    assert page.size == (6, 4) and not page.getexif()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>", "no PNG, JPEG or WebP"),
        (encode(Image.new("RGB", (99, 99), "red"))[:-40], "cannot be decoded"),
        (encode(Image.new("RGB", (6, 4)), "GIF"), "no PNG, JPEG or WebP"),
    ],
)
def test_a_broken_page_names_shard_and_member(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=rf"the page 'k.png' in shard .*a\.tar .*{reason}") as error:
        reader_of(tmp_path, data).page(0)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_a_broken_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(tmp_path, encode(Image.new("RGB", (99, 99))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(UserError, match=r"'k.png'.*decompression bomb"):
        reader.page(0)


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 4, 2)
    reader = PairReader(build_index(shards))
    assert reader.query(0) == "query 0"
    size = shards[1].stat().st_size
    with shards[1].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=rf"part-001.tar has {size + 512} bytes and its index says {size}.*index again"):
        reader.query(3)
    os.truncate(shards[0], 600)  # under the open file
    with pytest.raises(UserError, match=r"part-000.tar ends at byte \d+ and its index says"):
        reader.page(0)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"part-001.tar cannot be read \(No such file"):
        reader.query(3)


def test_a_query_that_was_overwritten_is_refused(tmp_path: Path) -> None:
    (shard,) = write_pairs(tmp_path, 1, 1)
    reader = PairReader(build_index([shard]))
    shard.write_bytes(shard.read_bytes().replace(b'"query"', b'"other"'))
    with pytest.raises(UserError, match=r"part-000.tar has no query for 'k00000' any more"):
        reader.query(0)


def open_files_below(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [target for target in targets if target.startswith(str(folder))]


def test_open_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "_OPEN_SHARDS", 3)
    reader = PairReader(build_index(write_pairs(tmp_path, 6, 6)))
    assert open_files_below(tmp_path) == []
    for pair in (0, 1, 2, 0, 3, 4):
        reader.query(pair)
    assert sorted(Path(name).name for name in open_files_below(tmp_path)) == [f"part-00{i}.tar" for i in (0, 3, 4)]
    reader.close()
    assert open_files_below(tmp_path) == []


def test_a_worker_process_opens_its_own(tmp_path: Path) -> None:
    write_index(build_index(write_pairs(tmp_path, 2, 1)), tmp_path / "index.arrow")
    reader = PairReader(open_index(tmp_path / "index.arrow"))
    reader.query(0)
    sent = pickle.dumps(reader)
    # The index travels as the name of its file, whatever its size.
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert there._file_of_shard == {}
    assert there.query(1) == reader.query(1) == "query 1"
    assert there.index.fingerprint == reader.index.fingerprint
    in_memory = pickle.loads(pickle.dumps(PairReader(build_index(sorted(tmp_path.glob("*.tar"))))))
    assert in_memory.query(1) == "query 1"
