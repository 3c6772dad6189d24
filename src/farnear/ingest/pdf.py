"""Turns PDFs into pairs: each page as an image, and a line of its own text as the query.

Nobody has to write queries for a first run on one's own documents: a line that stands on one page and on no other is a
question with exactly one right answer. It is an easy kind of query (the page holds its very words), so figures on it
say whether training works on these pages, not how a search for meaning would do.

Which line: one of enough words, made of letters for the most part (no tables of numbers, code or dotted leaders), that
occurs on no other page of any of the documents. Lines are compared without digits, case and punctuation, which also
rules out running headers with a page number and headings that the table of contents repeats. Of these the one whose
words are rarest in its document, added up, so that long and specific lines win. It is the same line every time.

Text is read from all PDFs first; pages are rendered while shards are written, and only those that have a query. pdfium
must not run in two threads of a process, so several processes render when there are enough pages.
"""

import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.errors import UserError
from farnear.ingest.pool import chunks, map_in_order, processes_for
from farnear.ingest.shards import (
    EVAL,
    TRAIN,
    ImportReport,
    Pair,
    Record,
    import_pairs,
    key_for,
    refuse_existing_shards,
)

if TYPE_CHECKING:
    import pypdfium2

LETTERS_IN_A_LINE = 0.85  # of its visible characters; prose has 0.9 and more, code and tables less
JPEG_QUALITY = 90
PDFS_WORTH_A_PROCESS = 20
PAGES_WORTH_A_PROCESS = 100
PAGES_PER_TASK = 8

# pdfium joins a word that is hyphenated at a line's end and marks the seam with one of these.
SEAM = re.compile("\\S*[\x02\ufffe]\\S*")
# Chinese and Japanese put no spaces between words: there each character counts as a word.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\u3040-\u30ff\u3400-\u9fff]+")

PageOfPdf = tuple[Path, int]  # the file, and the page's number from 0


def import_pdf(
    source: Path,
    out: Path,
    *,
    eval_fraction: float = 0.0,
    seed: int = 0,
    pairs_per_shard: int = 1000,
    max_side: int = 1024,
    png: bool = False,
    min_words: int = 4,
) -> ImportReport:
    """Write the pages of PDFs as shards, a line of each page's text as its query.

    With several PDFs, each is one document of the split, so that no PDF is on both sides. Where only one has usable
    pages, it could not be split like that; there each page is a document of its own.

    Args:
        source: a PDF, or a folder that is searched for PDFs with all folders below it.
        out: the folder for `train-*.tar` and `eval-*.tar`.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none.
        seed: settles the split.
        pairs_per_shard: the last shard of a side may hold fewer.
        max_side: length in pixels of a rendered page's longer side.
        png: store pages as PNG instead of JPEG of quality 90, which is smaller and decodes twice as fast.
        min_words: a query has at least so many words.

    Returns:
        What was written; `skipped` names every page without a usable line.

    Raises:
        UserError: no PDF, one that cannot be read, no usable line anywhere, or see `farnear.ingest.shards`.
    """
    refuse_existing_shards(out, (TRAIN, EVAL))
    if max_side < 1:
        raise UserError(f"max_side is {max_side}, but a page needs pixels; give the longer side's length, such as 1024")
    path_of_name = _find_pdfs(source)
    processes = processes_for(len(path_of_name), items_worth_a_process=PDFS_WORTH_A_PROCESS)
    texts = map_in_order(_lines_of_pages, path_of_name.values(), processes)
    lines_of_pages = dict(zip(path_of_name, texts, strict=True))
    queries = choose_queries(lines_of_pages, min_words)

    alone = len({name for name, _ in queries}) == 1
    records: list[Record] = []
    skipped: list[str] = []
    page_of_key: dict[str, PageOfPdf] = {}
    for number, (name, path) in enumerate(path_of_name.items()):
        for page in range(len(lines_of_pages[name])):
            query = queries.get((name, page))
            if query is None:
                skipped.append(
                    f"{name} page {page + 1}: no line of prose, {min_words} words or more, that only this page has"
                )
                continue
            key = key_for(number, f"{path.stem[:60]}-p{page + 1:05d}")
            records.append(Record(key, query, f"{name} page {page + 1}" if alone else name))
            page_of_key[key] = (path, page)
    if not records:
        raise UserError(
            f"none of the {len(skipped)} pages under {source} has a line of text to ask for it by; scanned pages need "
            "a text layer (OCR) first, and shorter lines are taken with a smaller --min-words"
        )
    load = partial(_rendered, page_of_key=page_of_key, max_side=max_side, png=png)
    return import_pairs(
        records,
        load,
        out,
        eval_fraction=eval_fraction,
        seed=seed,
        pairs_per_shard=pairs_per_shard,
        skipped=skipped,
    )


def choose_queries(lines_of_pages: Mapping[str, Sequence[Sequence[str]]], min_words: int) -> dict[tuple[str, int], str]:
    """The line to ask for each page by.

    Args:
        lines_of_pages: for each document its pages, for each page its lines.
        min_words: shorter lines are not used.

    Returns:
        The line for (document, page number from 0); pages without a usable line are missing.
    """
    pages_with_line = Counter(
        words for pages in lines_of_pages.values() for lines in pages for words in {_words(line) for line in lines}
    )
    query_of_page: dict[tuple[str, int], str] = {}
    for name, pages in lines_of_pages.items():
        pages_with_word = Counter(word for lines in pages for word in {w for line in lines for w in _words(line)})
        rarity = {word: math.log((1 + len(pages)) / count) for word, count in pages_with_word.items()}
        for page, lines in enumerate(pages):
            usable = [
                (sum(rarity[word] for word in sorted(set(words))), line)
                for line in lines
                if len(words := _words(line)) >= min_words and pages_with_line[words] == 1 and _is_prose(line)
            ]
            if usable:
                query_of_page[name, page] = max(usable)[1]
    return query_of_page


def _find_pdfs(source: Path) -> dict[str, Path]:
    """PDFs by their path relative to `source`, in alphabetical order."""
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


def _lines_of_pages(path: Path) -> list[list[str]]:
    """The lines of text of every page, in clean characters and with single spaces."""
    with _opened(path) as document:
        texts = [page.get_textpage().get_text_bounded() for page in document]
    return [[line for line in map(_cleaned, SEAM.sub("\n", text).splitlines()) if line] for text in texts]


def _cleaned(line: str) -> str:
    """Ligatures and wide letters as plain ones, no control or private characters (bullets, often), single spaces."""
    plain = unicodedata.normalize("NFKC", line)
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Co", "Cn") else c for c in plain).split())


@lru_cache(maxsize=4096)
def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # a mark, such as a vowel sign in Devanagari, belongs to a word


@lru_cache(maxsize=1 << 16)
def _words(line: str) -> tuple[str, ...]:
    """The words without digits, case and punctuation: what makes two lines the same one."""
    letters_of_tokens = ("".join(filter(_is_letter, token)) for token in line.casefold().split())
    return tuple(word for letters in letters_of_tokens for word in WORD.findall(letters))


def _is_prose(line: str) -> bool:
    visible = line.replace(" ", "")
    return sum(map(_is_letter, visible)) >= LETTERS_IN_A_LINE * len(visible)


def _rendered(
    records: Sequence[Record], page_of_key: Mapping[str, PageOfPdf], max_side: int, png: bool
) -> Iterator[Pair]:
    tasks = chunks((page_of_key[record.key] for record in records), PAGES_PER_TASK)
    processes = processes_for(len(records), items_worth_a_process=PAGES_WORTH_A_PROCESS)
    images = chain.from_iterable(map_in_order(partial(_render, max_side=max_side, png=png), tasks, processes))
    for record, image in zip(records, images, strict=True):
        yield Pair(record.key, record.query, image, "png" if png else "jpg", record.document)


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
