"""Rows of any dataset become pairs: bytes untouched, columns found or named, bad rows counted, both layouts alike."""

import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset
from datasets import Array3D, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from tar_makers import image_bytes, members_of

from farnear import cli
from farnear.errors import UserError
from farnear.ingest.dataset_columns import choose_columns
from farnear.ingest.huggingface import import_table, open_table
from farnear.ingest.images import extension_of
from farnear.ingest.shards import ImportReport

ImportRows = Callable[..., ImportReport]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


@pytest.fixture
def import_rows(tmp_path: Path) -> ImportRows:
    """Saves columns as a dataset and imports it to tmp_path/NAME."""

    def run(rows: dict[str, Sequence[Any]], features: Features | None = None, out: str = "out", **options: Any) -> Any:
        source = tmp_path / "saved" / out
        Dataset.from_dict(rows, features=features).save_to_disk(str(source))
        table = open_table(str(source))
        given = {part: options.pop(part) for part in ("query", "page", "negatives", "document") if part in options}
        return import_table(table, choose_columns(table.rows.features, **given), tmp_path / out, **options)

    return run


def contents_inline(shards: Sequence[Path]) -> dict[str, tuple[Any, bytes, list[bytes]]]:
    """(query, page, hard negatives) by key."""
    members = members_of(shards)
    found = {}
    for key in [name.removesuffix(".json") for name in members if name.endswith(".json")]:
        parts = {name[len(key) + 1 :]: data for name, data in members.items() if name.startswith(f"{key}.")}
        negatives = [parts[name] for name in sorted(parts) if name.startswith("neg")]
        [page] = [data for name, data in parts.items() if name != "json" and not name.startswith("neg")]
        found[key] = (json.loads(parts["json"])["query"], page, negatives)
    return found


def contents_by_reference(shards: Sequence[Path], corpus: Sequence[Path]) -> dict[str, tuple[Any, bytes, list[bytes]]]:
    page_of_id = {name.partition(".")[0]: data for name, data in members_of(corpus).items()}
    found = {}
    for name, data in members_of(shards).items():
        pair = json.loads(data)
        negatives = [page_of_id[page] for page in pair["neg_ids"]]
        found[name.removesuffix(".json")] = (pair["query"], page_of_id[pair["pos_id"]], negatives)
    return found


def photos(*numbers: int | None, format: str = "PNG") -> list[dict[str, Any] | None]:
    """Cells of an image column, as they are stored."""
    return [None if n is None else {"bytes": image_bytes(n, format), "path": None} for n in numbers]


def of_images(*names: str, query: Any = None) -> Features:
    return Features({"query": query or Value("string"), **{name: datasets.Image() for name in names}})


def test_the_reference_layout_of_columns_is_natural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "id": [7, 8, 9],
        "query": ["größer", "b", "c"],
        "image": photos(0, 1, 2, format="JPEG"),
        "negative_10": photos(30, None, None),
        "negative_2": photos(20, 21, None, format="WEBP"),
    }
    features = Features({"id": Value("int64"), **of_images("image", "negative_10", "negative_2")})
    source = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_dict(rows, features=features)}).save_to_disk(str(source))
    out = tmp_path / "shards"
    assert cli.main(["shards", "from-hf", str(source), str(out), "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert "columns: query from 'query'; page from 'image'; hard negatives from 'negative_2', 'negative_10'" in text
    assert "not used: 'id'" in text
    assert "train: 3 pairs in 1 shard\n" in text
    assert f"train:\n  - {out}/train-*.tar\n" in text
    members = members_of([out / "train-000000.tar"])
    assert sorted(members) == [
        *("train-0000000.jpg", "train-0000000.json", "train-0000000.neg0.webp", "train-0000000.neg1.png"),
        *("train-0000001.jpg", "train-0000001.json", "train-0000001.neg0.webp"),
        *("train-0000002.jpg", "train-0000002.json"),
    ]
    assert members["train-0000000.jpg"] == image_bytes(0, "JPEG")
    assert members["train-0000000.neg0.webp"] == image_bytes(20, "WEBP")
    assert members["train-0000000.neg1.png"] == image_bytes(30)
    assert json.loads(members["train-0000000.json"])["query"] == "größer"

    assert cli.main(["shards", "from-hf", str(source), str(out), "--name", "eval", "--limit", "2"]) == 0
    assert "eval: 2 pairs in 1 shard\n" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"train-000000.tar", "eval-000000.tar"}
    assert cli.main(["shards", "from-hf", str(source), str(out), "--name", "eval"]) == 2


def test_webdataset_reads_the_same_keys_and_bytes(import_rows: ImportRows) -> None:
    rows = {"query": ["a", "b"], "image": photos(0, 1), "negatives": [photos(2, 3), photos(4)]}
    features = Features({**of_images("image"), "negatives": List(datasets.Image())})
    for options in ({}, {"corpus": True}):
        report = import_rows(rows, features, out=f"out{len(options)}", **options)
        shards = [*report.train_shards, *report.train_corpus]
        read = {
            f"{sample['__key__']}.{extension}": data
            for sample in webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
            for extension, data in sample.items()
            if not extension.startswith("__")
        }
        assert read == members_of(shards)
        assert len(read) == 7


def test_both_layouts_hold_the_same(import_rows: ImportRows) -> None:
    # Page 1 is asked for twice and a negative of others; the last negative of row 2 is missing.
    rows = {
        "query": ["a", "b", "c", "d"],
        "image": photos(0, 1, 2, 1),
        "negatives": [photos(1, 2), photos(0), photos(1, None), []],
    }
    features = Features({**of_images("image"), "negatives": List(datasets.Image())})
    inline = import_rows(rows, features)
    stored = import_rows(rows, features, out="referenced", corpus=True, pairs_per_shard=2)
    expected = contents_inline(inline.train_shards)
    assert contents_by_reference(stored.train_shards, stored.train_corpus) == expected
    assert [len(negatives) for _, _, negatives in expected.values()] == [2, 1, 1, 0]
    assert stored.corpus_pages == len(members_of(stored.train_corpus)) == 3
    assert [path.name for path in stored.train_corpus] == ["corpus-train-000000.tar", "corpus-train-000001.tar"]
    assert stored.train_pairs == inline.train_pairs == 4


@pytest.mark.parametrize("corpus", [False, True])
def test_a_share_is_kept_for_evaluation_by_document(import_rows: ImportRows, corpus: bool) -> None:
    rows = {
        "query": [f"query {row}" for row in range(20)],
        "image": photos(*range(20)),
        "report": [f"report {row // 4}" for row in range(20)],
    }
    features = Features({**of_images("image"), "report": Value("string")})
    report = import_rows(rows, features, document="report", eval_fraction=0.2, corpus=corpus)
    assert (report.train_pairs, report.eval_pairs) == (16, 4)
    if corpus:  # each side finds its pages in its own corpus
        assert [len(members_of(shards)) for shards in (report.train_corpus, report.eval_corpus)] == [16, 4]
        for side in ("train", "eval"):
            shards, pages = getattr(report, f"{side}_shards"), getattr(report, f"{side}_corpus")
            assert pages[0].name == f"corpus-{side}-000000.tar"
            assert set(contents_by_reference(shards, pages)) == {name[:-5] for name in members_of(shards)}
    sides = [
        {json.loads(data)["document"] for name, data in members_of(shards).items() if name.endswith(".json")}
        for shards in (report.train_shards, report.eval_shards)
    ]
    assert len(sides[0]) == 4 and len(sides[1]) == 1 and not sides[0] & sides[1]


def test_without_documents_a_page_stays_on_one_side(import_rows: ImportRows) -> None:
    rows = {"query": [f"query {row}" for row in range(12)], "image": photos(*[row // 2 for row in range(12)])}
    report = import_rows(rows, of_images("image"), eval_fraction=0.5)
    sides = [
        {page for _, page, _ in contents_inline(shards).values()}
        for shards in (report.train_shards, report.eval_shards)
    ]
    assert report.eval_pairs == 6
    assert not sides[0] & sides[1]


def test_several_queries_for_one_page(import_rows: ImportRows) -> None:
    rows = {"queries": [["a", "b"], ["c"]], "page": [image_bytes(0), image_bytes(1)]}
    report = import_rows(rows, Features({"queries": List(Value("string")), "page": Value("binary")}))
    assert [query for query, _, _ in contents_inline(report.train_shards).values()] == [["a", "b"], "c"]
    assert report.train_pairs == 3


def test_texts_as_pages(import_rows: ImportRows) -> None:
    rows = {"anchor": ["a"], "positive": ["größer"], "negative": ["no.png"]}
    report = import_rows(rows, texts=True)
    members = members_of(report.train_shards)
    assert members["train-0000000.txt"] == "größer".encode()
    assert members["train-0000000.neg0.txt"] == b"no.png"
    with pytest.raises(UserError, match=r"names 'größer', but there is no such file .* and not paths, say --texts"):
        import_rows(rows, out="images")
    with pytest.raises(UserError, match=r"names '(long ){20}\.\.\.', which cannot be read .* say --texts"):
        import_rows({"anchor": ["a"], "positive": ["long " * 1000]}, out="images")
    stored = import_rows(rows, texts=True, corpus=True, out="other")
    found = contents_by_reference(stored.train_shards, stored.train_corpus)
    assert found == contents_inline(report.train_shards)


def saved(format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), (6, 4), options.pop("colour", (3, 1, 77))).save(stream, format, **options)
    return stream.getvalue()


def test_formats_that_no_reader_knows_become_png_and_are_counted(import_rows: ImportRows) -> None:
    cmyk = saved("JPEG", mode="CMYK", colour=(9, 9, 9, 9))
    pages = [saved("TIFF"), saved("BMP"), saved("TIFF", mode="CMYK", colour=(0, 0, 0, 0)), cmyk]
    rows = {"query": list("abcd"), "image": [{"bytes": page, "path": "page.png"} for page in pages]}
    report = import_rows(rows, of_images("image"))
    assert report.notes == ("1 page from BMP converted to PNG", "2 pages from TIFF converted to PNG")
    stored = [page for _, page, _ in contents_inline(report.train_shards).values()]
    assert [extension_of(page) for page in stored] == ["png", "png", "png", "jpg"]
    assert stored[3] == cmyk
    with Image.open(io.BytesIO(stored[0])) as picture:
        assert picture.getpixel((0, 0)) == (3, 1, 77)


def test_arrays_become_png_without_loss(import_rows: ImportRows) -> None:
    array = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    grey = array[..., 0].tolist()
    rows = {"query": ["a"], "image": [array], "neg_image": [grey], "negatives": [[array.tolist(), array.tolist()]]}
    features = Features(
        {
            **of_images(),
            "image": Array3D((4, 5, 3), "uint8"),
            "neg_image": List(List(Value("uint8"))),
            "negatives": List(Array3D((4, 5, 3), "uint8")),
        }
    )
    report = import_rows(rows, features)
    [(_, page, negatives)] = contents_inline(report.train_shards).values()
    assert report.notes == ("4 pages from an array converted to PNG",)
    for data, expected in zip([page, *negatives], [array, grey, array, array], strict=True):
        with Image.open(io.BytesIO(data)) as picture:
            assert np.array_equal(np.asarray(picture), expected)


def test_paths_start_in_the_folder_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "in" / "scans").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "in" / "scans" / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "in" / "pairs.csv").write_text("query,image\na,scans/0.png\nb,scans/1.png\n")
    Dataset.from_dict({"query": ["a", "b"], "image": ["scans/0.png", "scans/1.png"]}).to_parquet(
        str(tmp_path / "in" / "pairs.parquet")
    )
    (tmp_path / "in" / "pairs.jsonl").write_text('{"query": "a", "image": "scans/0.png"}\n' * 2)
    for name, last in (("pairs.csv", 1), ("pairs.parquet", 1), ("pairs.jsonl", 0)):
        table = open_table(str(tmp_path / "in" / name))
        report = import_table(table, choose_columns(table.rows.features), tmp_path / f"out-{name}")
        pages = [page for _, page, _ in contents_inline(report.train_shards).values()]
        assert pages == [image_bytes(0), image_bytes(last)]


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    (folder / "metadata.csv").write_text("file_name,query\n0.png,a\n1.png,b\n")
    table = open_table(str(folder))
    report = import_table(table, choose_columns(table.rows.features), tmp_path / "out")
    found = contents_inline(report.train_shards).values()
    assert [(query, page) for query, page, _ in found] == [("a", image_bytes(0)), ("b", image_bytes(1))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Pages by number; each is busy at first, `/gone` is never there. Yields its address and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = self.path.removesuffix(".png").lstrip("/").isdecimal()
            status = 404 if not known else 503 if asked.count(self.path) == 1 else 200
            data = image_bytes(int(self.path[1:-4])) if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("farnear.ingest.images._FIRST_WAIT_SECONDS", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_addresses_are_fetched_and_tried_again(import_rows: ImportRows, server: tuple[str, list[str]]) -> None:
    address, asked = server
    rows = {"query": ["a", "b"], "url": [f"{address}/{number}.png" for number in range(2)]}
    report = import_rows(rows)
    assert [page for _, page, _ in contents_inline(report.train_shards).values()] == [image_bytes(0), image_bytes(1)]
    assert sorted(asked) == ["/0.png", "/0.png", "/1.png", "/1.png"]
    asked.clear()
    with pytest.raises(UserError, match=r"row 0: the column 'url' holds a page which names .*/gone.*HTTP 404"):
        import_rows({"query": ["a"], "url": [f"{address}/gone"]}, out="gone")
    assert asked == ["/gone"]


def cut_short() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 9).save(stream, "PNG")
    return stream.getvalue()[:-90]


BAD_ROWS = {
    "query": ["good", None, " ", "no page", "broken", "also good"],
    "image": [*photos(0, 1, 2, None), {"bytes": cut_short(), "path": None}, *photos(5)],
    "negative": [*photos(6, 7, 8, 9, 10), {"bytes": b"no picture", "path": None}],
}


def test_bad_rows_are_left_out_with_counts(import_rows: ImportRows) -> None:
    for options in ({}, {"eval_fraction": 0.3}, {"corpus": True}):
        report = import_rows(BAD_ROWS, of_images("image", "negative"), out=f"o{options}", skip_bad=True, **options)
        assert report.train_pairs + report.eval_pairs == 2
        assert [reason.split(", first")[0] for reason in report.skipped] == [
            "1 hard negatives that cannot be read",
            "1 rows whose page cannot be read",
            "1 rows with an empty query",
            "1 rows without a page",
            "1 rows without a query",
        ]
        assert "row 5: the column 'negative' holds a page which is no image that Pillow knows" in report.skipped[0]
        if not options:
            found = contents_inline(report.train_shards)
            assert list(found) == ["train-0000000", "train-0000005"]
            assert [len(negatives) for _, _, negatives in found.values()] == [1, 0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (1, "row 0: the column 'query' holds no query; mend it, or leave such rows out with --skip-bad"),
        (2, "row 0: the column 'query' holds an empty query"),
        (3, "row 0: the column 'image' holds no page"),
        (4, r"row 0: the column 'image' holds a page which cannot be decoded \("),
        (5, "row 0: the column 'negative' holds a page which is no image"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(row: int, words: str, import_rows: ImportRows, tmp_path: Path) -> None:
    rows = {name: [values[row], values[0]] for name, values in BAD_ROWS.items()}
    with pytest.raises(UserError, match=words):
        import_rows(rows, of_images("image", "negative"))
    assert not list((tmp_path / "out").glob("*"))


def test_an_import_of_nothing_is_an_error(import_rows: ImportRows, tmp_path: Path) -> None:
    for corpus in (False, True):
        with pytest.raises(UserError, match=r"has no usable row for train shards \(1 rows with an empty query"):
            import_rows({"query": [" "], "image": photos(0)}, of_images("image"), skip_bad=True, corpus=corpus)
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["image"],
            r"no column has a usual name of the query \(query, .*--query-column; the columns are image \(Image\)",
        ),
        (["query"], r"no column has a usual name of the page .*--page-column; the columns are query \(string\)"),
        (["query", "question", "image"], "'query' and 'question' could all be the query.*--query-column"),
        (["query", "image", "page"], "'image' and 'page' could all be the page.*--page-column"),
    ],
)
def test_columns_that_cannot_be_guessed_are_listed(names: list[str], words: str) -> None:
    types = {"query": Value("string"), "question": Value("string"), "image": datasets.Image(), "page": Value("binary")}
    with pytest.raises(UserError, match=words):
        choose_columns({name: types[name] for name in names})


def test_columns_are_guessed_by_name_and_type() -> None:
    types = {
        "query": Value("int64"),  # a number is no query, whatever its name
        "anchor": Value("string"),
        "text": Value("string"),
        "positive": datasets.Image(),
        "hard_negatives": List(datasets.Image()),
        "neg_1": datasets.Image(),
        "negative_scores": List(Value("float32")),
    }
    columns = choose_columns(types)
    assert (columns.query, columns.page, columns.negatives) == ("anchor", "positive", ("hard_negatives", "neg_1"))
    assert columns.unused == ("query", "text", "negative_scores")
    named = choose_columns(types, query="text", negatives=[], document="query")
    assert (named.query, named.negatives, named.document) == ("text", (), "query")
    with pytest.raises(UserError, match="no column 'scan'; the columns are query"):
        choose_columns(types, page="scan")
    with pytest.raises(UserError, match="'positive' is given two parts"):
        choose_columns(types, negatives=["positive"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a/b"}, "'a/b' is no name for shards"),
        ({"name": "corpus-2"}, "not start with 'corpus'"),
        ({"name": "eval", "eval_fraction": 0.1}, "would both write eval"),
        ({"eval_fraction": 1.5}, "leaves nothing to train on"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], words: str, import_rows: ImportRows) -> None:
    with pytest.raises(UserError, match=words):
        import_rows({"query": ["a", "b"], "image": photos(0, 1)}, of_images("image"), **options)


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    for source, words in (
        ("./nowhere", "nowhere does not exist"),
        ("nobody/no-such-dataset", "no-such-dataset cannot be opened as a dataset"),
        (__file__, "no table of a known kind"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_table(source)
        assert "\n" not in str(caught.value)
    rows = Dataset.from_dict({"query": ["a"]})
    DatasetDict({"one": rows, "two": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="has the splits one, two; name the one to import with --split"):
        open_table(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no split 'three', only one, two"):
        open_table(str(tmp_path / "saved"), split="three")
    assert len(open_table(str(tmp_path / "saved"), split="two").rows) == 1
