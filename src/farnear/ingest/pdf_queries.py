"""What to ask for a PDF's pages by: lines of their text, entries of the outline, or a list that somebody has written.

A line of text. Nobody has to write queries for a first run on one's own documents: a line that stands on one page and
on no other is a question with exactly one right answer. It is an easy kind of query (the page holds its very words), so
figures on it say whether training works on these pages, not how a search for meaning would do.

Which line: one of enough words, made of letters for the most part (no tables of numbers, code or dotted leaders), that
occurs on no other page of any of the documents. Lines are compared without digits, case and punctuation, which also
rules out running headers with a page number and headings that the table of contents repeats. Of these the one whose
words are rarest in its document, added up, so that long and specific lines win. It is the same line every time.

An entry of the outline (the bookmarks) is a heading that points at its page. Short ones are joined with the headings
above them, "Exports: By region", until they have enough words; what then occurs twice is no query.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.csv_file import read_rows

LETTERS_IN_A_LINE = 0.85  # of its visible characters; prose has 0.9 and more, code and tables less
# Chinese and Japanese put no spaces between words: there each character counts as a word.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\u3040-\u30ff\u3400-\u9fff]+")
_SECTION_NUMBER = re.compile(r"^\(?\d+(?:\.\d+)*[.):]?\s+")

Queries = dict[tuple[str, int], tuple[str, ...]]
"""The queries of each (document, page number from 0)."""


@dataclass(frozen=True)
class Heading:
    """An entry of an outline: the titles from the top down to it, and the page from 0 that it points at, if any."""

    titles: tuple[str, ...]
    page: int | None


def line_queries(lines_of_pages: Mapping[str, Sequence[Sequence[str]]], min_words: int) -> Queries:
    """The line to ask for each page by.

    Args:
        lines_of_pages: for each document its pages, for each page its lines.
        min_words: shorter lines are not used.

    Returns:
        The line of each (document, page number from 0); pages without a usable line are missing.
    """
    pages_with_line = Counter(
        words for pages in lines_of_pages.values() for lines in pages for words in {words_of(line) for line in lines}
    )
    query_of_page: Queries = {}
    for name, pages in lines_of_pages.items():
        pages_with_word = Counter(word for lines in pages for word in {w for line in lines for w in words_of(line)})
        rarity = {word: math.log((1 + len(pages)) / count) for word, count in pages_with_word.items()}
        for page, lines in enumerate(pages):
            usable = [
                (sum(rarity[word] for word in sorted(set(words))), line)
                for line in lines
                if len(words := words_of(line)) >= min_words and pages_with_line[words] == 1 and _is_prose(line)
            ]
            if usable:
                query_of_page[name, page] = (max(usable)[1],)
    return query_of_page


def outline_queries(outlines: Mapping[str, Sequence[Heading]], min_words: int) -> Queries:
    """The headings that point at each page.

    Args:
        outlines: for each document its headings.
        min_words: shorter headings are joined with those above them, and not used when that is not enough.

    Returns:
        The queries of (document, page number from 0); pages without one are missing.
    """
    found = [
        (name, heading.page, query)
        for name, headings in outlines.items()
        for heading in headings
        if heading.page is not None and len(words_of(query := _joined(heading.titles, min_words))) >= min_words
    ]
    times = Counter(words_of(query) for _, _, query in found)
    queries: Queries = {}
    for name, page, query in found:
        if times[words_of(query)] == 1:
            queries[name, page] = (*queries.get((name, page), ()), query)
    return queries


def listed_queries(source: Path, pages_of_pdf: Mapping[str, int]) -> Queries:
    """The queries in a CSV with the columns `file`, `page` (from 1) and `query`; a page may have several rows.

    Args:
        source: the CSV.
        pages_of_pdf: the number of pages of each document.

    Raises:
        UserError: it is no such CSV, or names a file or a page that is not there.
    """
    queries: Queries = {}
    _, rows = read_rows(source, required=("file", "page", "query"))
    for line, row in rows:
        name, page, query = row["file"], row["page"], row["query"]
        if name not in pages_of_pdf:
            known = ", ".join(map(repr, list(pages_of_pdf)[:3]))
            raise UserError(
                f"{source} line {line} names the file {name!r}, which is none of the {len(pages_of_pdf)} PDFs "
                f"({known}, ...); paths are relative to the PDFs' folder"
            )
        if not page.isdecimal() or not 1 <= int(page) <= pages_of_pdf[name]:
            raise UserError(
                f"{source} line {line} names page {page!r} of {name}, which has the pages 1 to {pages_of_pdf[name]}"
            )
        if not query:
            raise UserError(f"{source} line {line} has an empty query, which finds nothing; write one or delete it")
        place = (name, int(page) - 1)
        queries[place] = (*queries.get(place, ()), query)
    return queries


def _joined(titles: Sequence[str], min_words: int) -> str:
    """The last title, with as many before it as it takes to have enough words."""
    query = ""
    for title in reversed(titles):
        title = _SECTION_NUMBER.sub("", title)
        query = f"{title}: {query}" if query else title
        if len(words_of(query)) >= min_words:
            break
    return query


@lru_cache(maxsize=4096)
def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # a mark, such as a vowel sign in Devanagari, belongs to a word


@lru_cache(maxsize=1 << 16)
def words_of(line: str) -> tuple[str, ...]:
    """The words without digits, case and punctuation: what makes two lines the same one."""
    letters_of_tokens = ("".join(filter(_is_letter, token)) for token in line.casefold().split())
    return tuple(word for letters in letters_of_tokens for word in WORD.findall(letters))


def _is_prose(line: str) -> bool:
    visible = line.replace(" ", "")
    return sum(map(_is_letter, visible)) >= LETTERS_IN_A_LINE * len(visible)
