"""Imports one's own pairs: a CSV that names an image file for each query.

The first line names the columns: `query`, `image`, when pages belong together `document`, and, for hard negatives,
`negative_0`, `negative_1` and so on, whose cells may be empty. Image paths are relative to the CSV's folder. An image's
bytes go into a shard as they are: what was compressed once is not compressed again. Without a `document` column each
image file is a document of its own.

Whatever is wrong with a row is an error that names its line: an import that leaves rows out would be found out late.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.dataset_columns import NEGATIVE_NAME, in_natural_order
from farnear.ingest.images import IMAGE_EXTENSIONS, PageFile, fault_of
from farnear.ingest.pool import map_in_threads
from farnear.ingest.shards import ImportReport, Pair, import_pairs, key_for
from farnear.ingest.split import Record

COLUMNS = ("query", "image", "document")
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


@dataclass(frozen=True)
class _Files:
    """The image files of a row, and the line that names them."""

    line: int
    page: Path
    negatives: tuple[Path, ...]


def import_csv(
    source: Path, out: Path, *, eval_fraction: float = 0.0, seed: int = 0, pairs_per_shard: int = 1000
) -> ImportReport:
    """Write the pairs of a CSV as shards.

    Args:
        source: UTF-8, with the columns `query`, `image` and perhaps `document` and `negative_0` ...
        out: the folder for `train-*.tar` and `eval-*.tar`.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none.
        seed: settles the split.
        pairs_per_shard: the last shard of a side may hold fewer.

    Returns:
        What was written; `skipped` names every column that is not used.

    Raises:
        UserError: a column is missing, a row has no query or no readable image, or see `farnear.ingest.shards`.
    """
    records: list[Record] = []
    files_of_key: dict[str, _Files] = {}
    columns, rows = read_rows(source, required=("query", "image"))
    negatives = sorted(filter(NEGATIVE_NAME.fullmatch, columns), key=in_natural_order)
    for line, row in rows:
        image = _image_path(source, line, row["image"])
        if not row["query"]:
            raise UserError(
                f"{source} line {line} has an empty query, which finds nothing; write one or delete the line"
            )
        key = key_for(line, image.stem)
        records.append(Record(key, row["query"], row.get("document") or image.as_posix()))
        wrong = tuple(_image_path(source, line, row[name]) for name in negatives if row[name])
        files_of_key[key] = _Files(line, image, wrong)
    if not records:
        raise UserError(f"{source} holds no rows below its header, so there is nothing to import; add some")
    return import_pairs(
        records,
        partial(_loaded, source=source, files_of_key=files_of_key),
        out,
        eval_fraction=eval_fraction,
        seed=seed,
        pairs_per_shard=pairs_per_shard,
        skipped=[
            f"column {name!r}: not one of {', '.join(COLUMNS)}, negative_0, ..."
            for name in columns
            if name not in (*COLUMNS, *negatives)
        ],
    )


def read_rows(source: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV in UTF-8, separated by commas, or by semicolons or tabs if its first line is.

    Args:
        required: names that must each head one column; others may be there too.

    Returns:
        The names of all columns, in lower case, and each row with the number of the line that it ends on, texts without
        the white space around them.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a row with more fields than columns.
    """
    if not source.is_file():
        raise UserError(f"{source} is not a file, so there is nothing to import; check the path")
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            # Spreadsheets write semicolons where a comma is the decimal point.
            header = stream.readline()
            delimiter = max(_SEPARATORS, key=header.count)
            stream.seek(0)
            reader = csv.DictReader(stream, skipinitialspace=True, delimiter=delimiter)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} is not a CSV in UTF-8 ({error}); save it as one") from error
    for name in (*required, *filter(None, columns)):
        if columns.count(name) != 1:
            raise UserError(
                f"{source} has {columns.count(name)} columns named {name!r} instead of one, only "
                f"{', '.join(map(repr, columns)) or 'none'}; its first line must name {', '.join(required)}"
            )
    for line, row in rows:
        if None in row:
            raise UserError(
                f"{source} line {line} has more fields than the header's {len(columns)}, so they cannot be told "
                f"apart; put double quotes around texts that hold {_SEPARATORS[delimiter]}"
            )
    stripped = [(line, {name: (text or "").strip() for name, text in row.items()}) for line, row in rows]
    # A line of separators only is what spreadsheets leave of a row that was emptied: no row, like an empty line.
    return columns, [(line, row) for line, row in stripped if any(row.values())]


def _image_path(source: Path, line: int, place: str) -> Path:
    image = source.parent / place
    if not place:
        raise UserError(
            f"{source} line {line} names no image, so there is no page to find; name one or delete the line"
        )
    if image.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        raise UserError(
            f"{source} line {line} names the image {place!r}, whose type is not supported; convert it to one of "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    if not image.is_file():
        raise UserError(
            f"{source} line {line} names the image {place!r}, but there is no file {image}; paths are relative to the "
            "CSV's folder"
        )
    return image


def _loaded(records: Sequence[Record], source: Path, files_of_key: Mapping[str, _Files]) -> Iterator[Pair]:
    return map_in_threads(partial(_load, source=source, files_of_key=files_of_key), records)


def _load(record: Record, source: Path, files_of_key: Mapping[str, _Files]) -> Pair:
    files = files_of_key[record.key]
    page, *negatives = (_page(source, files.line, path) for path in (files.page, *files.negatives))
    return Pair(record.key, record.query, page.data, page.extension, record.document, tuple(negatives))


def _page(source: Path, line: int, path: Path) -> PageFile:
    image = path.read_bytes()
    if fault := fault_of(image):
        raise UserError(f"{source} line {line} names {path}, {fault}; replace or remove it")
    return PageFile(image, path.suffix.lower().lstrip("."))
