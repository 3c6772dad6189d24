"""Turns PDFs into pairs: each page as an image, and what `farnear.ingest.pdf_queries` finds to ask for it by.

Or into pages alone, for which a model or a person is to write queries (`farnear shards queries`), or which an
evaluation takes for distractors. Beside each such page stands what is known about it: its document, its number, and its
text, by which queries that only copy from the page can be told.

All PDFs are read first; pages are rendered while shards are written, and only those that have a query. pdfium must not
run in two threads of a process, so several processes render when there are enough pages.
"""

import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.errors import UserError
from farnear.ingest.pdf_queries import Heading, Queries, line_queries, listed_queries, outline_queries
from farnear.ingest.pool import chunks, map_in_order, processes_for
from farnear.ingest.shards import (
    EVAL,
    TRAIN,
    CorpusPage,
    ImportReport,
    Pair,
    import_pairs,
    key_for,
    refuse_existing_shards,
    write_shards,
)
from farnear.ingest.split import Record
from farnear.wording import counted, spans

if TYPE_CHECKING:
    import pypdfium2

TEXT, OUTLINE = "text", "outline"  # where queries come from
CORPUS = "corpus"
JPEG_QUALITY = 90
PDFS_WORTH_A_PROCESS = 20
PAGES_WORTH_A_PROCESS = 100
PAGES_PER_TASK = 8

# pdfium joins a word that is hyphenated at a line's end and marks the seam with one of these.
SEAM = re.compile("\\S*[\x02\ufffe]\\S*")
PageOfPdf = tuple[Path, int]  # the file, and the page's number from 0


@dataclass(frozen=True)
class Contents:
    """What is in a PDF: its number of pages, the lines of text on each (if they were asked for), and its outline."""

    pages: int
    lines_of_pages: list[list[str]]
    outline: list[Heading]


def import_pdf(
    source: Path,
    out: Path,
    *,
    queries: str | Path = TEXT,
    eval_fraction: float = 0.0,
    seed: int = 0,
    pairs_per_shard: int = 1000,
    max_side: int = 1024,
    png: bool = False,
    min_words: int = 4,
) -> ImportReport:
    """Write the pages of PDFs that have queries as shards.

    With several PDFs, each is one document of the split, so that no PDF is on both sides. Where only one has usable
    pages, it could not be split like that; there each page is a document of its own.

    Args:
        source: a PDF, or a folder that is searched for PDFs with all folders below it.
        out: the folder for `train-*.tar` and `eval-*.tar`.
        queries: "text" (a line of each page), "outline" (the headings that point at it), or a CSV with the columns
            `file`, `page` and `query`.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none.
        seed: settles the split.
        pairs_per_shard: the last shard of a side may hold fewer.
        max_side: length in pixels of a rendered page's longer side.
        png: store pages as PNG instead of JPEG of quality 90, which is smaller and decodes twice as fast.
        min_words: a query from text or outline has at least so many words.

    Returns:
        What was written; `skipped` names what has no query.

    Raises:
        UserError: no PDF, one that cannot be read, no query anywhere, or see `farnear.ingest.shards`.
    """
    refuse_existing_shards(out, (TRAIN, EVAL))
    path_of_name = _find_pdfs(source, max_side)
    contents = _read(path_of_name, with_text=queries == TEXT)
    queries_of_page = _queries(queries, contents, min_words)
    alone = len({name for name, _ in queries_of_page}) == 1
    records: list[Record] = []
    page_of_key: dict[str, PageOfPdf] = {}
    for number, (name, path) in enumerate(path_of_name.items()):
        for page in range(contents[name].pages):
            if found := queries_of_page.get((name, page)):
                key = _key(number, path, page)
                records.append(Record(key, found, f"{name} page {page + 1}" if alone else name))
                page_of_key[key] = (path, page)
    if not records:
        raise UserError(_why_none(queries, source, sum(pdf.pages for pdf in contents.values())))

    def load(some: Sequence[Record]) -> Iterator[Pair]:
        images = _rendered([page_of_key[record.key] for record in some], max_side, png)
        for record, image in zip(some, images, strict=True):
            yield Pair(record.key, record.query, image, "png" if png else "jpg", record.document)

    return import_pairs(
        records,
        load,
        out,
        eval_fraction=eval_fraction,
        seed=seed,
        pairs_per_shard=pairs_per_shard,
        skipped=_skipped(queries, contents, queries_of_page, min_words),
    )


def import_pages(
    source: Path, out: Path, *, pages_per_shard: int = 1000, max_side: int = 1024, png: bool = False
) -> ImportReport:
    """Write all pages of PDFs as `corpus-*.tar`, without queries, with their text beside them; see `import_pdf`."""
    refuse_existing_shards(out, (CORPUS,))
    path_of_name = _find_pdfs(source, max_side)
    contents = _read(path_of_name, with_text=True)
    places = [(number, name, page) for number, (name, pdf) in enumerate(contents.items()) for page in range(pdf.pages)]

    def pages() -> Iterator[CorpusPage]:
        images = _rendered([(path_of_name[name], page) for _, name, page in places], max_side, png)
        for (number, name, page), image in zip(places, images, strict=True):
            text = "\n".join(contents[name].lines_of_pages[page])
            about = {"document": name, "page": page + 1, "text": text}
            yield CorpusPage(_key(number, path_of_name[name], page), image, "png" if png else "jpg", about)

    shards = write_shards(pages(), out, prefix=CORPUS, pairs_per_shard=pages_per_shard)
    return ImportReport((), (), 0, 0, (), eval_corpus=tuple(shards), corpus_pages=len(places))


def _queries(queries: str | Path, contents: Mapping[str, Contents], min_words: int) -> Queries:
    if queries == TEXT:
        return line_queries({name: pdf.lines_of_pages for name, pdf in contents.items()}, min_words)
    if queries == OUTLINE:
        return outline_queries({name: pdf.outline for name, pdf in contents.items()}, min_words)
    return listed_queries(Path(queries), {name: pdf.pages for name, pdf in contents.items()})


def _skipped(queries: str | Path, contents: Mapping[str, Contents], found: Queries, min_words: int) -> list[str]:
    """Of each PDF the pages without a line; with other queries, where few pages have one, how many have none."""
    missing = {name: [p for p in range(pdf.pages) if (name, p) not in found] for name, pdf in contents.items()}
    if queries == TEXT:
        return [
            f"{counted(len(pages), 'page')} of {name}: no line of prose, {min_words} words or more, that no other page "
            f"has (page{'s' * (len(pages) > 1)} {spans([page + 1 for page in pages])})"
            for name, pages in missing.items()
            if pages
        ]
    reason = f"no row of {queries} names them"
    if queries == OUTLINE:
        reason = f"no outline entry of {min_words} words or more, that occurs once, points at them"
    return [
        f"{len(pages)} of {contents[name].pages} pages of {name}: {reason}" for name, pages in missing.items() if pages
    ]


def _why_none(queries: str | Path, source: Path, pages: int) -> str:
    if queries == TEXT:
        return (
            f"none of the {pages} pages under {source} has a line of text to ask for it by; scanned pages need a text "
            "layer (OCR) first, and shorter lines are taken with a smaller --min-words"
        )
    if queries == OUTLINE:
        return (
            f"no outline entry points at any of the {pages} pages under {source} in words of its own; take lines of "
            "text (--queries text), or shorter entries with a smaller --min-words"
        )
    return f"{queries} has no rows below its header, so there is nothing to import; add some"


def _key(number: int, path: Path, page: int) -> str:
    return key_for(number, f"{path.stem[:60]}-p{page + 1:05d}")


def _find_pdfs(source: Path, max_side: int) -> dict[str, Path]:
    """PDFs by their path relative to `source`, in alphabetical order."""
    if max_side < 1:
        raise UserError(f"max_side is {max_side}, but a page needs pixels; give the longer side's length, such as 1024")
    if not source.exists():
        raise UserError(f"{source} does not exist, so there are no PDFs to import; check the path")
    if source.is_file():
        return {source.name: source}
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
    if not paths:
        raise UserError(
            f"no file under {source} ends in .pdf, so there is nothing to import; name a PDF or their folder"
        )
    return {path.relative_to(source).as_posix(): path for path in paths}


@contextmanager
def _opened(path: Path) -> "Iterator[pypdfium2.PdfDocument]":
    """The PDF; what pdfium cannot do with it inside the block is a UserError that names the file."""
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError("PDFs are read by pypdfium2, which is not installed; pip install 'farnear[pdf]'") from error
    try:
        with pypdfium2.PdfDocument(path) as document:
            yield document
    except pypdfium2.PdfiumError as error:
        remedy = "save a copy without its password" if "password" in str(error).lower() else "repair or remove the file"
        raise UserError(f"{path} cannot be read ({error}), so its pages would be missing; {remedy}") from error


def _read(path_of_name: Mapping[str, Path], *, with_text: bool) -> dict[str, Contents]:
    processes = processes_for(len(path_of_name), items_worth_a_process=PDFS_WORTH_A_PROCESS)
    contents = map_in_order(partial(_contents, with_text=with_text), path_of_name.values(), processes)
    return dict(zip(path_of_name, contents, strict=True))


def _contents(path: Path, with_text: bool) -> Contents:
    with _opened(path) as document:
        texts = [page.get_textpage().get_text_bounded() for page in document] if with_text else []
        return Contents(len(document), [_lines(text) for text in texts], _outline(document))


def _lines(text: str) -> list[str]:
    """Lines in clean characters and with single spaces."""
    return [line for line in map(_cleaned, SEAM.sub("\n", text).splitlines()) if line]


def _outline(document: "pypdfium2.PdfDocument") -> list[Heading]:
    headings: list[Heading] = []
    titles: list[str] = []
    for bookmark in document.get_toc():
        titles = [*titles[: bookmark.level], _cleaned(bookmark.get_title())]
        destination = bookmark.get_dest()
        headings.append(Heading(tuple(titles), None if destination is None else destination.get_index()))
    return headings


def _cleaned(line: str) -> str:
    """Ligatures and wide letters as plain ones, no control or private characters (bullets, often), single spaces."""
    plain = unicodedata.normalize("NFKC", line)
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Co", "Cn") else c for c in plain).split())


def _rendered(pages: Sequence[PageOfPdf], max_side: int, png: bool) -> Iterator[bytes]:
    processes = processes_for(len(pages), items_worth_a_process=PAGES_WORTH_A_PROCESS)
    render = partial(_render, max_side=max_side, png=png)
    return chain.from_iterable(map_in_order(render, chunks(pages, PAGES_PER_TASK), processes))


def _render(pages: Sequence[PageOfPdf], max_side: int, png: bool) -> list[bytes]:
    """Image files of some pages."""
    images: list[bytes] = []
    for path, numbers in groupby(pages, key=itemgetter(0)):
        with _opened(path) as document:
            for _, number in numbers:
                page = document[number]
                picture = page.render(scale=max_side / max(page.get_size())).to_pil().convert("RGB")
                stream = io.BytesIO()
                picture.save(stream, "PNG") if png else picture.save(stream, "JPEG", quality=JPEG_QUALITY)
                images.append(stream.getvalue())
    return images
