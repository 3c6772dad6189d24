"""The file in which `farnear mine` leaves hard negatives beside the shards, and from which a training takes them.

JSON lines. The first says what the file is; each other one is a training pair:

    {"format": "farnear negatives 1", "model": ..., "fingerprint": ..., "mining": {...}}
    {"shard": "train-000.tar", "key": "KEY", "neg_ids": ["PAGE", "train-003.tar/OTHER.png"],
     "neg_similarity": [0.71, 0.69], "pos_similarity": [0.83], "neg_teacher": [-1.2, 0.3], "pos_teacher": [4.1]}

Pairs and pages go by name (`farnear.data.document_names`), so a file fits any index of the same shards. ``pos_*`` has
a value for each positive of the pair, in the pair's own order; all but ``neg_ids`` may be missing. Another tool may
write such a file, without the first line too.

A training reads a million pairs in seconds, by Arrow and not line by line, and keeps what came of it beside its index,
where the next one and all ranks map it. What cannot be used is left out, counted and told.

Shapes: N pairs of the index, n lines, k items of all lists.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import xxhash

from farnear.data.columns import DamagedFileError, open_columns, write_columns
from farnear.data.document_names import DocumentNames, pair_rows
from farnear.data.index import Index
from farnear.data.joined import starts_of
from farnear.data.negatives import AnswersOfQueries, Bool, Float32, Int64, Negatives, first_of_content
from farnear.errors import UserError
from farnear.files import locked
from farnear.wording import counted

FORMAT = "farnear negatives 1"
CACHE_FORMAT = "farnear negatives cache 1"
_BLOCK = 1 << 24  # bytes that are parsed at once; a line must fit
_SCORES = pa.list_(pa.float32())
_SCHEMA = pa.schema(
    {
        "format": pa.string(),
        "shard": pa.large_string(),
        "key": pa.large_string(),
        "neg_ids": pa.list_(pa.large_string()),
        "neg_similarity": _SCORES,
        "pos_similarity": _SCORES,
        "neg_teacher": _SCORES,
        "pos_teacher": _SCORES,
    }
)
_COLUMNS = ("start_N1", "rows", "similarity", "teacher", "positive_teacher")


def write_line(
    file: BinaryIO,
    shard: str,
    key: str,
    neg_ids: Sequence[str],
    scores: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """Append a pair. ``scores`` are by the name of their column; NaN where there is none."""
    lists = {
        name: [None if np.isnan(value) else round(float(value), 6) for value in values]
        for name, values in scores.items()
    }
    record = {"shard": shard, "key": key, "neg_ids": list(neg_ids), **lists}
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def write_header(file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """The first line."""
    file.write(json.dumps({"format": FORMAT, **facts}, ensure_ascii=False).encode() + b"\n")


def read_negatives(
    paths: Sequence[str], index: Index, max_bad_fraction: float, *, tell: bool = False, kept_in: Path | None = None
) -> Negatives:
    """The negatives that the files name. A pair that no file names has none, one that is named twice has both lists.

    Args:
        paths: As `data.negatives` has them.
        max_bad_fraction: Share of the lines that may be of no use.
        tell: Whether to print what was left out.
        kept_in: Where what came of it is kept; beside the index if no folder is given.

    Raises:
        UserError: A file is missing or none of these, or too many lines are of no use.
    """
    files = [Path(os.path.expanduser(path)) for path in paths]
    name = ", ".join(map(str, files))
    digest = hashlib.blake2b(json.dumps([index.fingerprint, *map(_digest_of, files)]).encode(), digest_size=16)
    kept_in = kept_in or (index.path.parent if index.path else None)
    if kept_in is None:
        columns, header = _read(files, index)
    else:
        path = kept_in / f"negatives-{digest.hexdigest()}.arrow"
        found = _opened(path)
        if found is None:
            try:
                with locked(kept_in / "negatives.lock"):
                    found = _opened(path)
                    if found is None:
                        write_columns(path, *_read(files, index), CACHE_FORMAT)
                        found = open_columns(path, CACHE_FORMAT, check=False)
            except OSError as error:
                raise UserError(
                    f"what {name} names cannot be kept in {kept_in} ({error.strerror or error}), where "
                    "all ranks would find it; make the folder one that can be written to, with space on its disk"
                ) from None
        columns, header = found
    _judge(header["counts"], name, max_bad_fraction, tell)
    return Negatives(**{column: columns[column] for column in _COLUMNS}, origin=name)


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    try:
        return open_columns(path, CACHE_FORMAT, check=True)
    except (FileNotFoundError, DamagedFileError):
        return None


def _digest_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        inside = path / "negatives.jsonl"
        what = f"name {inside}" if inside.exists() else "name a file that `farnear mine` has written"
        raise UserError(f"data.negatives: {path} cannot be read ({error.strerror}); {what}") from None
    return str(digest.hexdigest())


def _read(files: Sequence[Path], index: Index) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and header of the file that is kept."""
    names = DocumentNames(index)
    answers = AnswersOfQueries(index)
    counts = dict.fromkeys(("lines", "unknown_pairs", "wrong_lengths", "unknown_pages", "useless"), 0)
    owner, rows, scores = [], [], []
    positive_teacher = np.full(len(index.positives), np.nan, np.float32)
    for path in files:
        lines = _Lines(path, _parsed(path), index)
        row_k = names.rows(lines.ids_k)
        is_known_k = row_k >= 0
        # A line that names pages, but none of this index, is of no use either.
        named_n = np.bincount(lines.line_k, minlength=len(lines.pair_n))
        known_n = np.bincount(lines.line_k[is_known_k], minlength=len(lines.pair_n))
        strange_n = lines.is_good_n & (named_n > 0) & (known_n == 0)
        counts["lines"] += len(lines.pair_n)
        counts["unknown_pairs"] += int((lines.pair_n < 0).sum())
        counts["wrong_lengths"] += int(((lines.pair_n >= 0) & ~lines.is_good_n).sum())
        counts["unknown_pages"] += int((~is_known_k & lines.is_good_n[lines.line_k]).sum())
        counts["useless"] += int((~lines.is_good_n | strange_n).sum())
        use_k = is_known_k & lines.is_good_n[lines.line_k]
        owner.append(lines.pair_n[lines.line_k][use_k])
        rows.append(row_k[use_k])
        scores.append([lines.scores_k(name)[use_k] for name in ("neg_similarity", "neg_teacher")])
        lines.fill_positive(positive_teacher, "pos_teacher")
    owner_k, row_k = np.concatenate(owner), np.concatenate(rows)
    similarity_k, teacher_k = (np.concatenate(column) for column in zip(*scores, strict=True))
    is_answer_k = answers.answers(owner_k, row_k)
    is_first_k = first_of_content(owner_k, index.input_hash_I[row_k])
    counts["positives"] = int(is_answer_k.sum())
    counts["copies"] = int((~is_first_k & ~is_answer_k).sum())
    kept = np.flatnonzero(~is_answer_k & is_first_k)
    kept = kept[np.argsort(owner_k[kept], kind="stable")]
    columns = {
        "start_N1": starts_of(np.bincount(owner_k[kept], minlength=len(index))),
        "rows": row_k[kept],
        "similarity": similarity_k[kept],
        "teacher": teacher_k[kept],
        "positive_teacher": positive_teacher,
    }
    return columns, {"counts": counts}


def _parsed(path: Path) -> pa.Table:
    wanted = f"data.negatives: {path} holds no hard negatives"
    try:
        table = pyarrow.json.read_json(
            path,
            read_options=pyarrow.json.ReadOptions(block_size=_BLOCK),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException as error:
        raise UserError(
            f"{wanted} ({' '.join(str(error).split())[:200]}); name a file that `farnear mine` has written"
        ) from None
    heads = table["format"].drop_null().to_pylist()
    if any(head != FORMAT for head in heads):
        raise UserError(f"{wanted} of this version (its format is {heads[0]!r} and not {FORMAT!r}); mine again")
    table = table.filter(pc.is_null(table["format"])).combine_chunks()
    if pc.any(pc.or_(pc.is_null(table["shard"]), pc.is_null(table["key"]))).as_py():
        raise UserError(f'{wanted} in some lines (no "shard" or no "key"); name a file that `farnear mine` has written')
    if not len(table) and not heads:
        raise UserError(f"{wanted}: it is empty; name a file that `farnear mine` has written")
    return table


class _Lines:
    """A file's lines: the pair of each, and their lists laid end to end."""

    def __init__(self, path: Path, table: pa.Table, index: Index) -> None:
        def column(name: str) -> Any:
            whole = table[name]
            return whole.chunk(0) if whole.num_chunks else pa.array([], whole.type)

        self._columns = {name: column(name) for name in _SCHEMA.names}
        self._index = index
        self.pair_n = pair_rows(index, self._columns["shard"], self._columns["key"])
        negatives_n = self._lengths("neg_ids")
        positives_n = np.append(np.diff(index.positive_start_N1), 0)[self.pair_n]
        is_good_n = self.pair_n >= 0
        for name in ("neg_similarity", "neg_teacher"):
            is_good_n &= self._is_null(name) | (self._lengths(name) == negatives_n)
        for name in ("pos_similarity", "pos_teacher"):
            is_good_n &= self._is_null(name) | (self._lengths(name) == positives_n)
        self.is_good_n: Bool = is_good_n
        self.line_k = np.repeat(np.arange(len(self.pair_n)), negatives_n)
        self.ids_k = self._columns["neg_ids"].flatten()

    def scores_k(self, name: str) -> Float32:
        """A score of each negative, NaN where the line has none; of lines with wrong lengths too."""
        return self._spread(name, self._lengths("neg_ids"))

    def fill_positive(self, into: Float32, name: str) -> None:
        """Write the scores of positives, which the lines have, to the places of ``Index.positives``."""
        has_n = self.is_good_n & ~self._is_null(name)
        pair_n, start_N1 = self.pair_n[has_n], self._index.positive_start_N1
        size_n = np.diff(start_N1)[pair_n]
        place = np.repeat(start_N1[pair_n] - (np.cumsum(size_n) - size_n), size_n) + np.arange(size_n.sum())
        into[place] = self._values(name)[np.repeat(has_n, self._lengths(name))]

    def _spread(self, name: str, size_n: Int64) -> Float32:
        fits_n = ~self._is_null(name) & (self._lengths(name) == size_n)
        spread = np.full(int(size_n.sum()), np.nan, np.float32)
        spread[np.repeat(fits_n, size_n)] = self._values(name)[np.repeat(fits_n, self._lengths(name))]
        return spread

    def _values(self, name: str) -> Float32:
        values = self._columns[name].flatten()
        return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)  # null becomes NaN

    def _lengths(self, name: str) -> Int64:
        lengths = pc.fill_null(pc.list_value_length(self._columns[name]), 0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64)

    def _is_null(self, name: str) -> Bool:
        return pc.is_null(self._columns[name]).to_numpy(zero_copy_only=False)


def _judge(counts: Mapping[str, int], name: str, max_bad_fraction: float, tell: bool) -> None:
    """Print what was left out.

    Raises:
        UserError: More than ``max_bad_fraction`` of the lines are of no use.
    """
    words = {
        "unknown_pairs": "of pairs that are none of this run",
        "wrong_lengths": "whose lists do not fit each other or the pair's positives",
    }
    told = [f"{counted(counts[what], 'line')} {which}" for what, which in words.items() if counts[what]]
    words = {
        "unknown_pages": "that no document is called",
        "positives": "among their query's answers",
        "copies": "with the content of one before",
    }
    told += [f"{counted(counts[what], 'negative')} {which}" for what, which in words.items() if counts[what]]
    summary = f"data.negatives: {name}: left out are {', '.join(told)}"
    if counts["useless"] > max_bad_fraction * counts["lines"]:
        raise UserError(
            f"{summary}: {counts['useless']:,} of {counted(counts['lines'], 'line')} are of no use, above "
            f"data.max_bad_fraction ({max_bad_fraction:g}); name the file that was mined of these shards, or mine again"
        )
    if told and tell:
        print(summary, flush=True)
