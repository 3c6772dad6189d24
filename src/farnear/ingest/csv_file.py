"""Imports one's own pairs: a CSV that names an image file for each query.

The first line names the columns: `query`, `image`, and, when pages belong together, `document`. Image paths are
relative to the CSV's folder. An image's bytes go into a shard as they are: what was compressed once is not compressed
again. Without a `document` column each image file is a document of its own.

Whatever is wrong with a row is an error that names its line: an import that leaves rows out would be found out late.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from farnear.errors import UserError
from farnear.ingest.shards import IMAGE_EXTENSIONS, ImportReport, Pair, Record, import_pairs, key_for

COLUMNS = ("query", "image", "document")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def import_csv(
    source: Path, out: Path, *, eval_fraction: float = 0.0, seed: int = 0, pairs_per_shard: int = 1000
) -> ImportReport:
    """Write the pairs of a CSV as shards.

    Args:
        source: UTF-8, comma-separated, with the columns `query`, `image` and perhaps `document`.
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
    place_of_key: dict[str, tuple[int, Path]] = {}
    columns, rows = _read(source)
    for line, row in rows:
        image = _image_path(source, line, row)
        if not row["query"]:
            raise UserError(
                f"{source} line {line} has an empty query, which finds nothing; write one or delete the line"
            )
        key = key_for(line, image.stem)
        records.append(Record(key, row["query"], row.get("document") or image.as_posix()))
        place_of_key[key] = (line, image)
    if not records:
        raise UserError(f"{source} holds no rows below its header, so there is nothing to import; add some")
    return import_pairs(
        records,
        partial(_loaded, source=source, place_of_key=place_of_key),
        out,
        eval_fraction=eval_fraction,
        seed=seed,
        pairs_per_shard=pairs_per_shard,
        skipped=[f"column {name!r}: not one of {', '.join(COLUMNS)}" for name in columns if name not in COLUMNS],
    )


def _read(source: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and each row with the number of the line that it ends on."""
    if not source.is_file():
        raise UserError(f"{source} is not a file, so there are no pairs to import; check the path")
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} is not a CSV in UTF-8 ({error}); save it as one") from error
    for name in ("query", "image"):
        if columns.count(name) != 1:
            raise UserError(
                f"{source} has {columns.count(name)} columns named {name!r} instead of one, only "
                f"{', '.join(map(repr, columns)) or 'none'}; its first line must name query, image and perhaps document"
            )
    for line, row in rows:
        if None in row:
            raise UserError(
                f"{source} line {line} has more fields than the header's {len(columns)}, so they cannot be told "
                "apart; put double quotes around texts that hold a comma"
            )
    return columns, [(line, {name: (text or "").strip() for name, text in row.items()}) for line, row in rows]


def _image_path(source: Path, line: int, row: Mapping[str, str]) -> Path:
    image = source.parent / row["image"]
    if image.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        raise UserError(
            f"{source} line {line} names the image {row['image']!r}, whose type is not supported; convert it to one of "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    if not image.is_file():
        raise UserError(
            f"{source} line {line} names the image {row['image']!r}, but there is no file {image}; paths are relative "
            "to the CSV's folder"
        )
    return image


def _fault_of(image: bytes) -> str | None:
    """Why training could not read an image, which would stop it days later."""
    try:
        with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
            picture.draft("RGB", (64, 64))  # a JPEG need not be decoded at its full size to be seen whole
            picture.load()
    except UnidentifiedImageError:
        return f"which is no image of the kinds {', '.join(IMAGE_FORMATS)}"
    except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
        return f"which cannot be decoded ({' '.join(str(error).split())})"
    return None


def _loaded(records: Sequence[Record], source: Path, place_of_key: Mapping[str, tuple[int, Path]]) -> Iterator[Pair]:
    for record in records:
        line, path = place_of_key[record.key]
        image = path.read_bytes()
        if complaint := _fault_of(image):
            raise UserError(f"{source} line {line} names {path}, {complaint}; replace or remove it")
        yield Pair(record.key, record.query, image, path.suffix.lower().lstrip("."), record.document)
