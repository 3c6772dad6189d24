"""What is in the shards, as text for people: how much, of which kinds, what repeats, what is wrong, how it begins."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from farnear.data.faults import fault_table, pairs_lost
from farnear.data.index import Index, modality_name
from farnear.data.read import BadInputError, InputReader
from farnear.data.sample import IMAGE
from farnear.data.shard_store import ShardStore
from farnear.wording import amount, counted, printable

Numbers = npt.NDArray[Any]

_PERCENTILES = (5, 50, 95, 100)
_TEXT_SHOWN = 160


def summary_text(index: Index, store: ShardStore, *, first_pairs: int = 3, faults_shown: int = 50) -> str:
    """The summary of an index, of several lines. Reads the first pairs; what cannot be read is told in its place."""
    documents = index.documents()
    edges = _edges(index)
    lines = [
        ("pairs", _pairs(index)),
        ("shards", _shards(index)),
        ("queries", _modalities(index, index.query_N)),
        ("positives", _modalities(index, index.positives)),
        ("negatives", _modalities(index, index.negatives)),
        ("corpus", _modalities(index, index.corpus_C)),
        ("page sizes", _page_sizes(index, documents)),
        ("negatives a pair", _spread(np.diff(index.negative_start_N1))),
        ("positives a query", _spread(np.unique(edges[:, 0], return_counts=True)[1])),
        ("queries a page", _spread(np.unique(edges[:, 1], return_counts=True)[1])),
        ("repeated queries", _repeated(index.query_hash_N, "are asked by more than one pair", "pairs")),
        ("repeated pages", _repeated(index.input_hash_I[documents], "are stored more than once", "copies")),
        (
            "left out",
            f"{counted(index.excluded, 'pair')} by data.exclude" if index.excluded else "nothing by data.exclude",
        ),
        ("ignored members", ignored_members(index) if index.ignored_members else "none"),
        ("faults", _faults(index)),
    ]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}   {value}" for name, value in lines]
    if index.faults:
        text += ["", fault_table(index.faults[:faults_shown])]
        if len(index.faults) > faults_shown:
            text.append(f"and {len(index.faults) - faults_shown:,} more")
    return "\n".join([*text, *map(printable, _first_pairs(index, store, first_pairs))])


def _pairs(index: Index) -> str:
    counts = np.diff(index.source_start_K1).tolist()
    of_sources = ", ".join(f"{name} {count:,}" for name, count in zip(index.sources, counts, strict=True))
    return f"{len(index):,}" + (f" ({of_sources})" if len(index.sources) > 1 else "")


def _shards(index: Index) -> str:
    of_corpus = len(np.unique(index.part_shard_M[index.part_start_I1[index.corpus_C]]))
    size_of_shard = dict(zip(index.shards, index.shard_size_S.tolist(), strict=True))  # one in two uses counts once
    of_pairs = len(index.shards) - of_corpus
    corpus = f" and {of_corpus:,} of documents" if of_corpus else ""
    return f"{of_pairs:,} of pairs{corpus}, {amount(sum(size_of_shard.values()))}"


def _modalities(index: Index, rows: Numbers) -> str:
    if not len(rows):
        return "none"
    bits, counts = np.unique(index.input_modality_I[rows], return_counts=True)
    parts = [f"{modality_name(int(bit))} {count:,}" for bit, count in zip(bits, counts, strict=True)]
    return ", ".join(parts)


def _page_sizes(index: Index, rows: Numbers) -> str:
    """Of the images among documents: percentiles by their pixels, each with the size of one such page."""
    is_used_M = index.is_part_of(rows) & (index.part_kind_M == IMAGE)
    if not is_used_M.any():
        return "no images"
    width, height = index.part_width_M[is_used_M], index.part_height_M[is_used_M]
    order = np.argsort(width.astype(np.int64) * height, kind="stable")
    places = [order[round((len(order) - 1) * percent / 100)] for percent in _PERCENTILES]
    sizes = [f"{percent} %: {width[at]} x {height[at]}" for percent, at in zip(_PERCENTILES, places, strict=True)]
    return f"{len(order):,} images, " + ", ".join(sizes)


def _edges(index: Index) -> Numbers:
    """(query hash, page hash) of each question with each page that answers it, once. [edges, 2]"""
    query = np.repeat(index.query_hash_N, np.diff(index.positive_start_N1))
    return np.unique(np.stack([query, index.input_hash_I[index.positives]], axis=1), axis=0)


def _spread(counts: Numbers) -> str:
    if not len(counts):
        return "none"
    if counts.min() == counts.max():
        return f"{counts[0]:,}"
    return f"{counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}, mean {counts.mean():,.2f}"


def _repeated(hashes: Numbers, how: str, of_what: str) -> str:
    _, counts = np.unique(hashes, return_counts=True)
    repeated = counts[counts > 1]
    return f"{len(repeated):,} {how} ({repeated.sum():,} {of_what})" if len(repeated) else "none"


def ignored_members(index: Index) -> str:
    """How many there are, with a few of their names: a key with a dot in it makes all members of a sample ignored."""
    examples = f" such as {printable(', '.join(index.ignored_examples))}" if index.ignored_examples else ""
    return f"{counted(index.ignored_members, 'member')}{examples}"


def _faults(index: Index) -> str:
    if not index.faults:
        return "none"
    return f"{len(index.faults):,}, which cost at least {counted(pairs_lost(index.faults), 'pair')}"


def _first_pairs(index: Index, store: ShardStore, count: int) -> Sequence[str]:
    reader = InputReader(index, store)
    lines = []
    try:
        for pair in range(min(count, len(index))):
            lines += ["", f"pair {index.pair_id(pair)}"]
            lines.append(f"  query     {_shown(reader, int(index.query_N[pair]))}")
            for what, rows in (("positive", index.positives_of(pair)), ("negative", index.negatives_of(pair))):
                lines += [f"  {what}  {_named(reader, row)}" for row in rows.tolist()]
    finally:
        reader.close()
    return lines


def _named(reader: InputReader, row: int) -> str:
    return f"{reader.index.input_id(row)}: {_shown(reader, row)}"


def _shown(reader: InputReader, row: int) -> str:
    try:
        return _in_words(reader[row])
    except BadInputError as error:
        return f"({error.reason})"


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        line = " ".join(value.split())
        return line if len(line) <= _TEXT_SHOWN else line[: _TEXT_SHOWN - 1] + "…"
    if isinstance(value, Image.Image):
        return f"image of {value.width} x {value.height}"
    if isinstance(value, list):
        return " | ".join(f"{message['role']}: {_content(message['content'])}" for message in value)
    if "sampling_rate" in value:
        return f"audio of {len(value['array']) / value['sampling_rate']:.1f} s at {value['sampling_rate']:,} Hz"
    if "video_metadata" in value:
        frames, height, width = value["array"].shape[:3]
        return f"video of {value['video_metadata']['duration']:.1f} s, {frames} frames of {width} x {height}"
    return ", ".join(_in_words(part) for part in value.values())


def _content(content: Any) -> str:
    if isinstance(content, str):
        return _in_words(content)
    return ", ".join(_in_words(part[part["type"]]) for part in content)
