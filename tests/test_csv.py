"""A CSV's pairs arrive with their bytes untouched, and each mistake in it is named with its line."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from tar_makers import image_bytes, members_of

from farnear.errors import UserError
from farnear.ingest.csv_file import import_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pages").mkdir()
    for number in range(6):
        (tmp_path / "pages" / f"page {number}.PNG").write_bytes(image_bytes(number))
    (tmp_path / "photo.webp").write_bytes(image_bytes(7, "WEBP"))
    return tmp_path


def write_csv(folder: Path, rows: Sequence[Sequence[str]], encoding: str = "utf-8") -> Path:
    path = folder / "pairs.csv"
    with path.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows(rows)
    return path


def documents_of(shards: Sequence[Path]) -> set[str]:
    return {json.loads(data)["document"] for name, data in members_of(shards).items() if name.endswith(".json")}


def test_pairs_are_stored_as_they_are(folder: Path) -> None:
    rows = [("query", "image"), ("what, exactly?", "pages/page 0.PNG"), ("größer", "photo.webp")]
    report = import_csv(write_csv(folder, rows, encoding="utf-8-sig"), folder / "out")
    assert (report.train_pairs, report.eval_pairs, report.skipped) == (2, 0, ())
    members = members_of(report.train_shards)
    assert list(members) == ["000002-page-0.json", "000002-page-0.png", "000003-photo.json", "000003-photo.webp"]
    assert members["000002-page-0.png"] == image_bytes(0)
    assert members["000003-photo.webp"] == (folder / "photo.webp").read_bytes()
    assert json.loads(members["000002-page-0.json"])["query"] == "what, exactly?"
    assert json.loads(members["000003-photo.json"])["query"] == "größer"


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_spreadsheet_s_semicolons_and_tabs_are_read(separator: str, folder: Path) -> None:
    lines = [separator.join(row) for row in [("query", "image"), ('"what, and; how?"', "photo.webp")]]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    report = import_csv(folder / "pairs.csv", folder / "out")
    (record,) = (json.loads(data) for name, data in members_of(report.train_shards).items() if name.endswith(".json"))
    assert record["query"] == "what, and; how?"


def test_documents_stay_whole_in_a_split(folder: Path) -> None:
    rows = [(f"query {number}", f"pages/page {number}.PNG", f"report {number // 2}") for number in range(6)]
    source = write_csv(folder, [("query", "image", "document"), *rows])
    report = import_csv(source, folder / "out", eval_fraction=1 / 3)
    assert (report.train_pairs, report.eval_pairs) == (4, 2)
    assert len(documents_of(report.train_shards)) == 2
    assert len(documents_of(report.eval_shards)) == 1


def test_an_image_asked_for_twice_stays_on_one_side(folder: Path) -> None:
    rows = [(f"query {number}", f"pages/page {number // 2}.PNG") for number in range(12)]
    report = import_csv(write_csv(folder, [("query", "image"), *rows]), folder / "out", eval_fraction=0.5)
    assert (report.train_pairs, report.eval_pairs) == (6, 6)
    assert not documents_of(report.train_shards) & documents_of(report.eval_shards)


def test_hard_negatives_are_columns_of_paths(folder: Path) -> None:
    rows = [
        ("query", "negative_10", "image", "negative_9"),
        ("a", "pages/page 1.PNG", "pages/page 0.PNG", "photo.webp"),
        ("b", "pages/page 2.PNG", "pages/page 1.PNG", ""),
        ("c", "", "pages/page 2.PNG", ""),
    ]
    report = import_csv(write_csv(folder, rows), folder / "out")
    members = members_of(report.train_shards)
    assert list(members) == [
        *("000002-page-0.json", "000002-page-0.neg0.webp", "000002-page-0.neg1.png", "000002-page-0.png"),
        *("000003-page-1.json", "000003-page-1.neg0.png", "000003-page-1.png"),
        *("000004-page-2.json", "000004-page-2.png"),
    ]
    assert members["000002-page-0.neg0.webp"] == (folder / "photo.webp").read_bytes()
    assert members["000002-page-0.neg1.png"] == image_bytes(1)
    assert members["000003-page-1.neg0.png"] == image_bytes(2)
    assert report.skipped == ()
    for cell, words in (("no.png", "there is no file"), ("fake.png", "which is no image")):
        (folder / "fake.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=f"line 2 names .*{words}"):
            import_csv(write_csv(folder, [rows[0], ("a", cell, "photo.webp", "")]), folder / "bad")


def test_a_column_that_is_not_used_is_named(folder: Path) -> None:
    rows = [("query", "image", "docment"), ("a", "photo.webp", "x")]
    assert import_csv(write_csv(folder, rows), folder / "out").skipped == (
        "column 'docment': not one of query, image, document, negative_0, ...",
    )


GOOD = ("a", "photo.webp")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("text", "image"), GOOD], "0 columns named 'query' instead of one, only 'text', 'image'"),
        ([("query", "image", "query"), (*GOOD, "b")], "2 columns named 'query'"),
        ([("query", "image", "neg0", "neg0"), (*GOOD, "", "")], "2 columns named 'neg0'"),
        ([("query|image",), ("a|photo.webp",)], r"0 columns named 'query' instead of one, only 'query\|image'"),
        ([("query;image",), ("a;b;photo.webp",)], "line 2 has more fields .* hold a semicolon"),
        ([], "0 columns named 'query' instead of one, only none"),
        ([("query", "image")], "no rows below its header"),
        ([("query", "image"), GOOD, (" ", "photo.webp")], r"pairs\.csv line 3 has an empty query"),
        ([("query", "image"), GOOD, ("b", "no.png")], r"line 3 names the image 'no\.png', but there is no file"),
        ([("query", "image"), ("b", "pairs.csv")], r"line 2 names the image 'pairs\.csv'.*not supported.*png, jpg"),
        ([("query", "image"), ("b",)], "line 2 names no image"),
        ([("query", "image"), ("a", "b", "photo.webp")], "line 2 has more fields than the header's 2.*double quotes"),
    ],
)
def test_mistakes_are_named_with_their_line(rows: list[tuple[str, ...]], words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words):
        import_csv(write_csv(folder, rows), folder / "out")
    assert not (folder / "out").exists()


def test_a_file_that_is_no_image_is_named_and_nothing_is_written(folder: Path) -> None:
    (folder / "fake.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"line 3 names .*fake\.png, which is no image"):
        import_csv(write_csv(folder, [("query", "image"), GOOD, ("b", "fake.png")]), folder / "out")
    assert list((folder / "out").iterdir()) == []


def test_an_image_that_training_could_not_read_is_named(folder: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(folder / "bitmap.png", "BMP")
    Image.effect_noise((40, 40), 9).save(folder / "whole.png")
    Image.effect_noise((40, 40), 9).save(folder / "whole.jpg")
    for name in ("png", "jpg"):
        (folder / f"cut.{name}").write_bytes((folder / f"whole.{name}").read_bytes()[:-90])
    for name, words in {
        "bitmap.png": "is no image of the kinds PNG, JPEG, WEBP",
        "cut.png": "cannot be decoded",
        "cut.jpg": "cannot be decoded",
    }.items():
        with pytest.raises(UserError, match=rf"line 2 names .*{name}, which {words}.*; replace or remove it"):
            import_csv(write_csv(folder, [("query", "image"), ("b", name)]), folder / "out")
    whole = [("query", "image"), ("a", "whole.png"), ("b", "whole.jpg")]
    assert import_csv(write_csv(folder, whole), folder / "out").train_pairs == 2


def test_a_file_that_is_no_csv_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv is not a file"):
        import_csv(folder / "nowhere.csv", folder / "out")
    source = write_csv(folder, [("query", "image"), ("größer", "photo.webp")], encoding="latin-1")
    with pytest.raises(UserError, match=r"pairs\.csv is not a CSV in UTF-8"):
        import_csv(source, folder / "out")
