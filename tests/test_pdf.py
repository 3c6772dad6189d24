"""PDF pages become pairs whose query is a line that stands on that page and nowhere else."""

import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from farnear import cli
from farnear.errors import UserError
from farnear.ingest.pages import list_pages
from farnear.ingest.pdf import import_pdf
from farnear.ingest.pdf_queries import Heading, line_queries, outline_queries

pytest.importorskip("pypdfium2")

WORDS = [
    "amber",
    "badger",
    "cedar",
    "dolphin",
    "ember",
    "falcon",
    "garnet",
    "heron",
    "iris",
    "jasmine",
    "kestrel",
    "lantern",
    "maple",
    "nectar",
    "olive",
]


def write_pdf(
    path: Path,
    pages: Sequence[Sequence[str]],
    trailer: str = "",
    outline: Sequence[tuple[int, str, int | None]] = (),
) -> Path:
    """A PDF of the plainest kind: each page its lines of Helvetica, one below the other.

    The outline's entries are (level, title, page from 0), levels from 0 in the order of reading.
    """
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    bodies.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    bodies.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for number, lines in enumerate(pages):
        resources = "<< /Font << /F1 3 0 R >> >>"
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 400] /Resources {resources} "
            f"/Contents {5 + 2 * number} 0 R >>"
        )
        text = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 10 Tf 20 370 Td {text} ET"
        bodies.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    if outline:
        bodies[0] = f"<< /Type /Catalog /Pages 2 0 R /Outlines {len(bodies) + 1} 0 R >>"
        bodies += outline_bodies(outline, first=len(bodies) + 1)
    data = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("cp1252")
    start = len(data)
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(bodies) + 1
    data += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + f"startxref\n{start}\n%%EOF\n".encode())
    return path


def outline_bodies(outline: Sequence[tuple[int, str, int | None]], first: int) -> list[str]:
    """The objects of an outline, its root first, numbered from `first`; pages are objects 4, 6, 8, ..."""

    def children(parent: int) -> list[int]:
        level = -1 if parent < 0 else outline[parent][0]
        found = []
        for row in range(parent + 1, len(outline)):
            if outline[row][0] <= level:
                break
            if outline[row][0] == level + 1:
                found.append(row)
        return found

    parent_of = {child: row for row in range(-1, len(outline)) for child in children(row)}
    bodies = []
    for row in range(-1, len(outline)):
        body = "" if row >= 0 else "/Type /Outlines "
        if below := children(row):
            ends = (first + 1 + below[0], first + 1 + below[-1])
            body += f"/First {ends[0]} 0 R /Last {ends[1]} 0 R /Count {len(below)} "
        if row >= 0:
            _, title, page = outline[row]
            siblings = children(parent_of[row])
            place = siblings.index(row)
            body += f"/Title ({title}) /Parent {first + 1 + parent_of[row]} 0 R "
            if page is not None:
                body += f"/Dest [{4 + 2 * page} 0 R /Fit] "
            if place + 1 < len(siblings):
                body += f"/Next {first + 1 + siblings[place + 1]} 0 R "
        bodies.append(f"<< {body}>>")
    return bodies


def report_page(number: int, words: int = 5) -> list[str]:
    """A page with a running header, a line of its own, and a table row that is nearly the same on every page."""
    own = " ".join(WORDS[(number + step) % len(WORDS)] for step in range(words))
    return [f"Annual report of the company page {number}", f"Here the {own} appears", f"total 12 34 56 7{number}"]


def pairs_in(shards: Sequence[Path]) -> dict[str, tuple[str, str, bytes]]:
    """(query, document, image) by key."""
    pairs = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}
        for name in data:
            key, extension = name.split(".")
            if extension != "json":
                text = json.loads(data[f"{key}.json"])
                pairs[key] = (text["query"], text["document"], data[name])
    return pairs


def test_each_page_is_asked_for_by_its_own_line(tmp_path: Path) -> None:
    source = write_pdf(tmp_path / "Annual report.pdf", [report_page(number) for number in range(4)])
    report = import_pdf(source, tmp_path / "out")
    assert (report.train_pairs, report.eval_pairs, report.skipped) == (4, 0, ())
    pairs = pairs_in(report.train_shards)
    assert list(pairs) == [f"000000-Annual-report-p{number:05d}" for number in range(1, 5)]
    assert [query for query, _, _ in pairs.values()] == [report_page(number)[1] for number in range(4)]


def test_pages_are_rendered_in_the_size_and_format_asked_for(tmp_path: Path) -> None:
    source = write_pdf(tmp_path / "a.pdf", [report_page(0), report_page(1)])
    for out, png, expected in (("jpg", False, "JPEG"), ("png", True, "PNG")):
        pairs = pairs_in(import_pdf(source, tmp_path / out, max_side=200, png=png).train_shards)
        images = [Image.open(io.BytesIO(image)) for _, _, image in pairs.values()]
        assert [(image.format, image.size, image.mode) for image in images] == [(expected, (150, 200), "RGB")] * 2
        darkest = [image.convert("L").getextrema()[0] for image in images]
        assert max(darkest) < 128


def test_a_page_without_a_usable_line_is_named(tmp_path: Path) -> None:
    pages = [report_page(0), ["1 2 3 4 5"], [], ["Two words"]]
    report = import_pdf(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    assert report.train_pairs == 1
    why = "no line of prose, 4 words or more, that no other page has"
    assert report.skipped == (f"3 pages of a.pdf: {why} (pages 2-4)",)
    assert import_pdf(tmp_path / "a.pdf", tmp_path / "short", min_words=2).train_pairs == 2


def test_a_folder_is_split_by_pdf_and_a_single_pdf_by_page(tmp_path: Path) -> None:
    pages = [report_page(number, words) for words in (2, 3, 4, 5) for number in range(5)]
    for number in range(4):
        write_pdf(tmp_path / "in" / f"sub{number % 2}" / f"{number}.PDF", pages[5 * number : 5 * number + 5])
    report = import_pdf(tmp_path / "in", tmp_path / "by-pdf", eval_fraction=0.25)
    documents = [
        {document for _, document, _ in pairs_in(shards).values()}
        for shards in (report.train_shards, report.eval_shards)
    ]
    assert documents[0] | documents[1] == {"sub0/0.PDF", "sub0/2.PDF", "sub1/1.PDF", "sub1/3.PDF"}
    assert not documents[0] & documents[1]
    assert (report.train_pairs, report.eval_pairs) == (15, 5)

    report = import_pdf(tmp_path / "in" / "sub0" / "0.PDF", tmp_path / "by-page", eval_fraction=0.4)
    assert (report.train_pairs, report.eval_pairs) == (3, 2)


def test_a_line_on_pages_of_two_documents_is_no_query() -> None:
    shared, own = "the same long line stands here", "a line of its own"
    queries = line_queries({"a": [[shared, own]], "b": [[shared.upper() + " 7"]]}, min_words=4)
    assert queries == {("a", 0): (own,)}


def test_the_line_with_the_rarest_words_wins() -> None:
    common, rare = "the cat sat on the mat again", "glaciers retreat from alpine valleys"
    pages = [[common + " one", "the cat"], [common + " two", rare], [common + " three", "on the mat"]]
    assert line_queries({"a": pages}, min_words=4)[("a", 1)] == (rare,)


def test_code_and_leaders_are_no_queries() -> None:
    lines = [
        "set xr [0:1]; plot 'a.b' u 1:2 w l;",
        "See also plotting . . . . . . . . . . . . . 41",
        "a plain line of words",
    ]
    assert line_queries({"a": [lines]}, min_words=4) == {("a", 0): (lines[2],)}


@pytest.mark.parametrize("line", ["年次報告書の売上高", "यह एक छोटा वाक्य है"])
def test_words_of_other_scripts_are_counted(line: str) -> None:
    assert line_queries({"a": [[line]]}, min_words=5) == {("a", 0): (line,)}


def test_a_word_broken_at_the_end_of_a_line_is_left_out(tmp_path: Path) -> None:
    lines = ["Rivers carry the sediments of moun-", "tains down into estuaries"]
    report = import_pdf(write_pdf(tmp_path / "a.pdf", [lines]), tmp_path / "out")
    (query, _, _), *_ = pairs_in(report.train_shards).values()
    assert query == "Rivers carry the sediments of"


def test_many_pages_are_rendered_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pdf(tmp_path / "a.pdf", [report_page(number) for number in range(15)])
    alone = pairs_in(import_pdf(source, tmp_path / "alone", max_side=64).train_shards)
    monkeypatch.setattr("farnear.ingest.pdf.processes_for", lambda items, items_worth_a_process: 2)
    monkeypatch.setattr("farnear.ingest.pdf.PAGES_PER_TASK", 2)
    assert pairs_in(import_pdf(source, tmp_path / "together", max_side=64).train_shards) == alone


OUTLINE = [
    (0, "Exports", 0),
    (1, "1.1 By region and month", 1),
    (1, "Totals", 2),
    (1, "By region", 2),
    (0, "Imports of the whole country", None),
    (1, "By country of origin and month", 3),
    (1, "The usual notes on sources", 3),
    (1, "the usual notes on sources", 4),
]


def test_pages_are_asked_for_by_the_outline(tmp_path: Path) -> None:
    source = write_pdf(tmp_path / "a.pdf", [report_page(number) for number in range(5)], outline=OUTLINE)
    report = import_pdf(source, tmp_path / "out", queries="outline", min_words=3)
    queries = {key[-1]: query for key, (query, _, _) in pairs_in(report.train_shards).items()}
    # Page 1 and "Totals" have too few words even with the heading above; the notes occur twice.
    assert queries == {
        "2": "By region and month",
        "3": "Exports: By region",
        "4": "By country of origin and month",
    }
    assert report.skipped == (
        "2 of 5 pages of a.pdf: no outline entry of 3 words or more, that occurs once, points at them",
    )
    with pytest.raises(UserError, match="no outline entry points at any of the 5 pages"):
        import_pdf(source, tmp_path / "none", queries="outline", min_words=12)


def test_several_headings_of_a_page_are_several_queries() -> None:
    headings = [Heading(("Exports by region", title), 0) for title in ("In euro", "In tonnes", "In euro")]
    queries = outline_queries({"a": headings[:2], "b": [Heading(("Exports by region",), 1)]}, min_words=3)
    assert queries == {
        ("a", 0): ("Exports by region: In euro", "Exports by region: In tonnes"),
        ("b", 1): ("Exports by region",),
    }
    assert outline_queries({"a": headings}, min_words=3) == {("a", 0): ("Exports by region: In tonnes",)}


def test_pages_are_asked_for_by_a_csv(tmp_path: Path) -> None:
    for name in ("a.pdf", "sub/b.pdf"):
        write_pdf(tmp_path / "in" / name, [[], [], []])
    listed = tmp_path / "queries.csv"
    listed.write_text("file,page,query\nsub/b.pdf,3,last one\na.pdf,1,first\na.pdf,1,also first\n")
    report = import_pdf(tmp_path / "in", tmp_path / "out", queries=listed)
    found = pairs_in(report.train_shards)
    assert {key: (query, document) for key, (query, document, _) in found.items()} == {
        "000000-a-p00001": (["first", "also first"], "a.pdf"),
        "000001-b-p00003": ("last one", "sub/b.pdf"),
    }
    assert report.skipped[1] == f"2 of 3 pages of sub/b.pdf: no row of {listed} names them"
    for row, words in (
        ("c.pdf,1,x", r"line 2 names the file 'c\.pdf', which is none of the 2 PDFs \('a\.pdf', 'sub/b\.pdf'"),
        ("a.pdf,4,x", r"line 2 names page '4' of a\.pdf, which has the pages 1 to 3"),
        ("a.pdf,0,x", "line 2 names page '0'"),
        ("a.pdf,two,x", "line 2 names page 'two'"),
        ("a.pdf,2,", "line 2 has an empty query"),
    ):
        listed.write_text(f"file,page,query\n{row}\n")
        with pytest.raises(UserError, match=words):
            import_pdf(tmp_path / "in", tmp_path / "bad", queries=listed)
    listed.write_text("file,page,query\n")
    with pytest.raises(UserError, match=r"queries\.csv has no rows below its header"):
        import_pdf(tmp_path / "in", tmp_path / "bad", queries=listed)


def test_pages_alone_are_a_corpus_with_their_text(tmp_path: Path) -> None:
    write_pdf(tmp_path / "in" / "a.pdf", [report_page(0), []])
    write_pdf(tmp_path / "in" / "b.pdf", [report_page(2)])
    out = tmp_path / "out"
    words = ["shards", "from-pdf", str(tmp_path / "in"), str(out), "--no-queries", "--pairs-per-shard", "2"]
    assert cli.main([*words, "--max-side", "80"]) == 0
    shards = sorted(out.iterdir())
    assert [path.name for path in shards] == ["corpus-000000.tar", "corpus-000001.tar"]
    pages = list_pages(shards)
    assert [page.key for page in pages] == ["000000-a-p00001", "000000-a-p00002", "000001-b-p00001"]
    assert [page.document for page in pages] == ["a.pdf", "a.pdf", "b.pdf"]
    assert [page.text for page in pages] == ["\n".join(report_page(0)), "", "\n".join(report_page(2))]
    sizes = [Image.open(io.BytesIO(page.read())).size for page in pages]
    assert sizes == [(60, 80)] * 3
    read = [
        (sample["__key__"], sample["jpg"], json.loads(sample["about.json"])["page"])
        for sample in webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    ]
    assert read == [(page.key, page.read(), number) for page, number in zip(pages, (1, 2, 1), strict=True)]
    assert cli.main(words) == 2


def test_where_queries_come_from_is_said_in_words_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "from-pdf", str(tmp_path), str(tmp_path / "out"), "--queries"]
    assert cli.main([*words, "outlines"]) == 2
    assert "--queries outlines names no source of queries" in capsys.readouterr().err
    assert cli.main([*words, "outline", "--no-queries"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_user_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nowhere does not exist"):
        import_pdf(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"no file under .*empty ends in \.pdf"):
        import_pdf(tmp_path / "empty", tmp_path / "out")

    (tmp_path / "torn.pdf").write_bytes(b"%PDF-1.4 and no more")
    with pytest.raises(UserError, match=r"torn\.pdf cannot be read.*repair or remove"):
        import_pdf(tmp_path / "torn.pdf", tmp_path / "out")

    lock = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'41' * 32}> /U <{'42' * 32}> >> /ID [<00> <00>]"
    locked = write_pdf(tmp_path / "locked.pdf", [report_page(0)], trailer=lock)
    with pytest.raises(UserError, match=r"locked\.pdf cannot be read.*without its password"):
        import_pdf(locked, tmp_path / "out")

    scanned = write_pdf(tmp_path / "scanned.pdf", [[], []])
    with pytest.raises(UserError, match=r"none of the 2 pages under .*scanned\.pdf has a line.*OCR"):
        import_pdf(scanned, tmp_path / "out")
    with pytest.raises(UserError, match="max_side is 0"):
        import_pdf(scanned, tmp_path / "out", max_side=0)
    assert not (tmp_path / "out").exists()


def test_without_pypdfium2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pdf(tmp_path / "a.pdf", [report_page(0)])
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(UserError, match=r"pip install 'farnear\[pdf\]'"):
        import_pdf(source, tmp_path / "out")
