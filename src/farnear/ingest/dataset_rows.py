"""Reads the rows of a dataset as queries, pages and hard negatives, and says which rows are no pairs.

A row is taken from its Arrow table as it is stored. `datasets` itself would decode the image files in it, and all that
could be written then are pixels, compressed a second time.

A row without a query or without a page that can be read stops the import, unless it is told to skip bad rows: then they
are counted by reason, with the first row of each reason as an example.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farnear.errors import UserError
from farnear.ingest.dataset_columns import Columns
from farnear.ingest.images import BadPageError, PageFile, hash_of, name_of, page_from, page_from_text
from farnear.ingest.pool import map_in_threads
from farnear.ingest.split import Queries, Record, queries_of, split

if TYPE_CHECKING:
    import datasets

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A dataset's split, how it is called in messages, and the folder where its relative paths start."""

    rows: "datasets.Dataset"
    name: str
    folder: Path


@dataclass(frozen=True)
class PreparedRow:
    """A row as it will be stored. `faults` are the negatives that could not be read: kind of fault and message."""

    key: str
    query: Queries
    document: str
    page: PageFile
    negatives: tuple[PageFile, ...]
    faults: tuple[tuple[str, str], ...]


class BadRowError(Exception):
    """A row that is no pair.

    Attributes:
        kind: of the fault, by which bad rows are counted.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RowReader:
    """The pairs of a table.

    Attributes:
        pairs: how many have been handed out, by the prefix of their shards.
        converted: how many pages had to become PNGs, by the format that they had.
    """

    def __init__(self, table: Table, columns: Columns, key_prefix: str, *, texts: bool, skip_bad: bool) -> None:
        self.table = table
        self.columns = columns
        self.key_prefix = key_prefix
        self.texts = texts
        self.skip_bad = skip_bad
        self.pairs: Counter[str] = Counter()
        self.converted: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._example_of_fault: dict[str, str] = {}

    def split(self, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Row numbers for training and for evaluation; rows that are seen to be bad are in neither.

        Raises:
            UserError: a row is bad and not to be skipped, or see `farnear.ingest.split`.
        """
        needed = [name for name in (self.columns.query, self.columns.page, self.columns.document) if name is not None]
        records, rows = [], []
        for row, cells in _cells(self.table.rows.select_columns(list(dict.fromkeys(needed)))):
            try:
                records.append(Record(str(row), self._query(cells), self._document(cells)))
                rows.append(row)
            except BadRowError as error:
                self._refuse(row, error.kind, str(error))
        train, evaluation = split(records, eval_fraction, seed)
        return [rows[number] for number in train], [rows[number] for number in evaluation]

    def prepared(self, prefix: str, rows: Sequence[int] | None) -> Iterator[PreparedRow]:
        """The pairs of some rows, or of all; images are fetched and checked a few rows ahead.

        Raises:
            UserError: a row is bad and not to be skipped.
        """
        for row, result in map_in_threads(self._prepare, _cells(self.table.rows, rows)):
            if isinstance(result, BadRowError):
                self._refuse(row, result.kind, str(result))
                continue
            for kind, message in result.faults:
                self._refuse(row, kind, message)
            for page in (result.page, *result.negatives):
                if page.converted_from:
                    self.converted[page.converted_from] += 1
            self.pairs[prefix] += len(queries_of(result.query))
            yield result

    def left_out(self) -> list[str]:
        """What was skipped, a line for each kind of fault."""
        return [f"{count} {kind}, first {self._example_of_fault[kind]}" for kind, count in sorted(self._faults.items())]

    def _refuse(self, row: int, kind: str, message: str) -> None:
        where = f"row {row}: {message}"
        if not self.skip_bad:
            raise UserError(f"{self.table.name} {where}; mend it, or leave such rows out with --skip-bad")
        self._faults[kind] += 1
        self._example_of_fault.setdefault(kind, where)

    def _prepare(self, numbered: tuple[int, Cells]) -> tuple[int, PreparedRow | BadRowError]:
        row, cells = numbered
        try:
            query, document = self._query(cells), self._document(cells)
            page = self._page(self.columns.page, cells[self.columns.page], "rows whose page cannot be read")
        except BadRowError as error:
            return row, error
        negatives, faults = [], []
        for column in self.columns.negatives:
            for value in _several(cells[column]):
                if _is_missing(value):
                    continue
                try:
                    negatives.append(self._page(column, value, "hard negatives that cannot be read"))
                except BadRowError as error:
                    faults.append((error.kind, str(error)))
        key = f"{self.key_prefix}-{row:07d}"
        return row, PreparedRow(key, query, document, page, tuple(negatives), tuple(faults))

    def _query(self, cells: Cells) -> Queries:
        value = cells[self.columns.query]
        queries = value if isinstance(value, list) else [value]
        if not queries or any(query is None for query in queries):
            raise BadRowError("rows without a query", f"the column {self.columns.query!r} holds no query")
        if not all(isinstance(query, str) for query in queries):
            raise BadRowError("rows whose query is no text", f"the column {self.columns.query!r} holds no text")
        if not all(query.strip() for query in queries):
            raise BadRowError("rows with an empty query", f"the column {self.columns.query!r} holds an empty query")
        return tuple(queries) if len(queries) > 1 else queries[0]

    def _document(self, cells: Cells) -> str:
        value = cells[self.columns.page]
        if _is_missing(value):
            raise BadRowError("rows without a page", f"the column {self.columns.page!r} holds no page")
        if self.columns.document is not None:
            if (document := cells[self.columns.document]) is None:
                raise BadRowError("rows without a document", f"the column {self.columns.document!r} holds nothing")
            return str(document)
        return hash_of(value.encode()) if self.texts and isinstance(value, str) else name_of(value)

    def _page(self, column: str, value: Any, kind: str) -> PageFile:
        try:
            if not self.texts:
                return page_from(value, self.table.folder)
            if isinstance(value, str):
                return page_from_text(value)
            raise BadPageError(f"which is {type(value).__name__} and not a text")
        except BadPageError as error:
            raise BadRowError(kind, f"the column {column!r} holds a page {error}") from error


def _cells(rows: "datasets.Dataset", numbers: Sequence[int] | None = None) -> Iterator[tuple[int, Cells]]:
    """Rows as they are stored, with their numbers."""
    chosen = rows if numbers is None else rows.select(numbers)
    for position, table in enumerate(chosen.with_format("arrow").iter(batch_size=1)):
        yield (position if numbers is None else numbers[position]), table.to_pylist()[0]


def _is_missing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value.get("bytes") and not value.get("path")
    return value is None or (isinstance(value, (str, bytes, list)) and len(value) == 0)


def _several(value: Any) -> list[Any]:
    """The pages in a cell: a list of files, addresses, texts or arrays is several, nested lists of numbers are one."""
    if not isinstance(value, list):
        return [value]
    depth, inner = 0, value
    while isinstance(inner, list) and inner:
        depth, inner = depth + 1, inner[0]
    is_array = isinstance(inner, int) and depth < 4
    return [value] if is_array else value
