"""Join the scans of all shards to an index: lay them end to end, find named pages, leave out what cannot be used.

Rows that counted from 0 within a shard count over all shards then. A pair that names a page by key gets its row; what
cannot be used, because its page stands nowhere or is too large, is left out with a fault, what ``data.exclude`` names
is left out and counted.

Shapes: S shards, M parts, I inputs, C documents of corpus shards, N pairs, K sources.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from farnear.data.columns import ArrowStrings
from farnear.data.faults import Fault, pairs_lost
from farnear.data.index import Index
from farnear.data.joined import (
    Bool,
    Int32,
    Int64,
    JoinedScans,
    RowLists,
    joined_numbers,
    starts_of,
    strings_of,
    text_column,
)
from farnear.data.remote import short_name, shown
from farnear.data.sample import IMAGE
from farnear.data.scan import EXAMPLES_OF_IGNORED
from farnear.data.scan_rows import ShardScan
from farnear.errors import UserError

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, above which it warns of a decompression bomb


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from by one weight, and the corpus shards that their pairs name pages of."""

    name: str
    shards: tuple[ShardScan, ...]
    corpus: tuple[ShardScan, ...] = ()


def join_scans(
    sources: Sequence[Source],
    corpus: Sequence[ShardScan] = (),
    *,
    etags: dict[str, str] | None = None,
    exclude: Iterable[tuple[str, str]] = (),
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Index:
    """Lay the scans end to end: rows that counted from 0 within a shard now count over all shards.

    Args:
        corpus: Shards of documents that the pairs of every source may name.
        etags: By shard, of those behind URLs.
        exclude: (shard, key) of pairs to leave out.
        max_image_pixels: Larger images are not used: their header alone says that they would fill the memory.

    Raises:
        UserError: A key is used by two shards of a source, or a page that a pair names stands in two corpus shards.
    """
    corpora = _distinct([*corpus, *(scan for source in sources for scan in source.corpus)])
    scans = [scan for source in sources for scan in source.shards] + corpora
    joined = JoinedScans(scans)
    draft = _Draft.of(sources, corpus, joined)
    excluded = draft.leave_out(exclude)
    draft.leave_out_large_images(max_image_pixels)
    draft.leave_out_missing_pages()
    columns = {**joined.columns(), **draft.columns(), **_shard_columns(sources, corpora)}
    examples = [f"{short_name(scan.shard)}/{name}" for scan in scans for name in scan.ignored_examples]
    return Index(
        shards=tuple(scan.shard for scan in scans),
        etags=tuple((etags or {}).get(scan.shard, "") for scan in scans),
        sources=tuple(source.name for source in sources),
        fingerprint=_fingerprint(sources, scans, draft.use_N, columns["positives"], columns["negatives"]),
        faults=tuple([fault for scan in scans for fault in scan.faults] + draft.faults),
        excluded=excluded,
        ignored_members=sum(scan.ignored_members for scan in scans),
        ignored_examples=tuple(examples[:EXAMPLES_OF_IGNORED]),
        **columns,
    )


def _shard_columns(sources: Sequence[Source], corpora: Sequence[ShardScan]) -> dict[str, Any]:
    shards = [(number, scan) for number, source in enumerate(sources) for scan in source.shards]
    pairs = [len(scan.columns["pair_key"]) + pairs_lost(scan.faults) for _, scan in shards]
    return {
        "shard_source_S": np.array([number for number, _ in shards] + [-1] * len(corpora), np.int32),
        "shard_pairs_S": np.array(pairs + [0] * len(corpora), np.int64),
    }


def _distinct(scans: Sequence[ShardScan]) -> list[ShardScan]:
    return list({scan.shard: scan for scan in scans}.values())


@dataclass
class _Draft:
    """The pairs while some of them are left out. A list's item is an input row, or -1 where no such page was found."""

    joined: JoinedScans
    faults: list[Fault]
    pair_key: ArrowStrings
    pair_shard_N: Int32
    source_N: Int32
    pages_K: list["_PagesByKey"]
    query_N: Int64
    query_hash_N: Int64
    positives: RowLists
    negatives: RowLists
    corpus_C: Int64
    use_N: Bool

    @classmethod
    def of(cls, sources: Sequence[Source], corpus: Sequence[ShardScan], joined: JoinedScans) -> "_Draft":
        scans = [scan for source in sources for scan in source.shards]
        pairs_S = [len(scan.columns["pair_key"]) for scan in scans]
        source_S = [position for position, source in enumerate(sources) for _ in source.shards]
        pages_K = [_PagesByKey(_distinct([*corpus, *source.corpus]), joined) for source in sources]
        lists: dict[str, RowLists] = {}
        for which in ("positive", "negative"):
            size_S = np.array([len(scan.columns[which]) for scan in scans], np.int64)
            rows = joined_numbers([np.asarray(scan.columns[which]) for scan in scans])
            named = rows < 0
            first_S = np.array([joined.first_input_of(scan) for scan in scans], np.int64)
            rows = np.where(named, -1, rows + np.repeat(first_S, size_S))
            keys = strings_of(scans, f"{which}_key")
            # A corpus is searched once a source: to build its table of keys costs more than all the searches.
            size_K = [sum(len(scan.columns[which]) for scan in source.shards) for source in sources]
            bounds = starts_of(np.array(size_K, np.int64))
            for pages, own in zip(pages_K, map(slice, bounds[:-1], bounds[1:]), strict=True):
                if named[own].any():
                    rows[own][named[own]] = pages.rows_of(keys[own], named[own])
            counts = [np.asarray(scan.columns[f"pair_{which}s"]) for scan in scans]
            lists[which] = RowLists(starts_of(joined_numbers(counts)), rows)
        query = [np.asarray(scan.columns["pair_query"]) + joined.first_input_of(scan) for scan in scans]
        draft = cls(
            joined=joined,
            faults=[],
            pair_key=strings_of(scans, "pair_key"),
            pair_shard_N=np.repeat(np.array([joined.number_of(scan) for scan in scans], np.int32), pairs_S),
            source_N=np.repeat(np.array(source_S, np.int32), pairs_S),
            pages_K=pages_K,
            query_N=joined_numbers(query),
            query_hash_N=joined_numbers([np.asarray(scan.columns["query_hash"]) for scan in scans]),
            positives=lists["positive"],
            negatives=lists["negative"],
            corpus_C=joined.documents_of([scan for scan in joined.scans if scan.corpus]),
            use_N=np.ones(sum(pairs_S), np.bool_),
        )
        draft._refuse_shared_keys()
        return draft

    def _refuse_shared_keys(self) -> None:
        for source in range(len(self.pages_K)):
            rows = np.flatnonzero(self.source_N == source)
            keys = self.pair_key.take(rows).column
            counts = pc.value_counts(keys)
            if len(counts) == len(keys):
                continue
            key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            first, second = rows[np.flatnonzero(pc.equal(keys, key).to_numpy(zero_copy_only=False))[:2]]
            shards = [shown(self.joined.scans[self.pair_shard_N[row]].shard) for row in (first, second)]
            raise UserError(
                f"the key {key.as_py()!r} is used in shard {shards[0]} and again in shard {shards[1]}, so its pairs "
                "cannot be told apart; give each sample a key of its own"
            )

    def leave_out_large_images(self, max_image_pixels: int) -> None:
        joined = self.joined
        pixels_M = joined.numbers("part_width").astype(np.int64) * joined.numbers("part_height")
        large_M = (joined.numbers("part_kind") == IMAGE) & (pixels_M > max_image_pixels)
        if not large_M.any():
            return
        counts_I = joined.numbers("input_parts")
        input_M = np.repeat(np.arange(len(counts_I)), counts_I)
        large_I = np.zeros(len(counts_I), np.bool_)
        large_I[input_M[large_M]] = True
        names, offset_M, shard_M = joined.strings("part_name"), joined.numbers("part_offset"), joined.shard_of_part_M()
        lost_I = self._drop_inputs(large_I)
        for part in np.flatnonzero(large_M).tolist():
            detail = f"{names[part]!r} has {pixels_M[part]:,} pixels, above {max_image_pixels:,}"
            shard = joined.scans[shard_M[part]].shard
            self.faults.append(Fault(shard, int(offset_M[part]), "too_many_pixels", detail, int(lost_I[input_M[part]])))
        self.corpus_C = self.corpus_C[~large_I[self.corpus_C]]

    def _drop_inputs(self, bad_I: Bool) -> Int64:
        """Take inputs out of all lists; how many pairs each of them costs."""
        before_N = self.use_N.copy()
        first_positive_N = self.positives.rows[np.minimum(self.positives.start_N1[:-1], len(self.positives.rows) - 1)]
        for lists in (self.positives, self.negatives):
            lists.keep((lists.rows < 0) | ~bad_I[lists.rows])
        self.use_N &= ~bad_I[self.query_N] & (self.positives.counts() > 0)
        lost_N = before_N & ~self.use_N
        lost_I = np.zeros(len(bad_I), np.int64)
        blamed = np.where(bad_I[self.query_N], self.query_N, first_positive_N)
        np.add.at(lost_I, blamed[lost_N], 1)
        return lost_I

    def leave_out_missing_pages(self) -> None:
        missing_N = np.where(self.use_N, self.positives.missing() + self.negatives.missing(), 0)
        for lists in (self.positives, self.negatives):
            lists.keep(lists.rows >= 0)
        lost_N = self.use_N & (self.positives.counts() == 0)
        self.use_N &= ~lost_N
        for number in np.unique(self.pair_shard_N[missing_N > 0]):
            pairs = np.flatnonzero((missing_N > 0) & (self.pair_shard_N == number))
            example = int(pairs[np.argmax(lost_N[pairs])])  # a lost one, if there is any
            page, corpus_is_named = self._missing_page_of(example)
            detail = (
                f"{len(pairs)} pairs name {missing_N[pairs].sum()} pages that stand in no corpus shard, {page!r} of "
                f"{self.pair_key[example]!r} for one; missing negatives are left out, pairs without a positive "
                "are lost" + ("" if corpus_is_named else ": name the corpus shards (data.train_corpus, --corpus)")
            )
            shard = self.joined.scans[number].shard
            self.faults.append(Fault(shard, 0, "missing_page", detail, int(lost_N[pairs].sum())))

    def _missing_page_of(self, pair: int) -> tuple[str, bool]:
        """The first page that a pair names and that is not there, and whether there are corpus shards at all."""
        number = self.pair_shard_N[pair]
        scan, pages = self.joined.scans[number], self.pages_K[self.source_N[pair]]
        pair_of_shard = pair - int(np.argmax(self.pair_shard_N == number))
        missing = []
        for which in ("positive", "negative"):
            start = starts_of(np.asarray(scan.columns[f"pair_{which}s"]))
            own = slice(*start[[pair_of_shard, pair_of_shard + 1]])
            keys, named = text_column(scan.columns[f"{which}_key"])[own], np.asarray(scan.columns[which])[own] < 0
            missing += [keys[place] for place in np.flatnonzero(named)[pages.rows_of(keys, named) < 0].tolist()]
        return missing[0], pages.row.size > 0

    def leave_out(self, exclude: Iterable[tuple[str, str]]) -> int:
        wanted = dict.fromkeys(exclude)
        if not wanted:
            return 0
        keys_of_shard: dict[str, list[str]] = {}
        for shard, key in wanted:
            keys_of_shard.setdefault(shard, []).append(key)
        before = int(self.use_N.sum())
        found: set[tuple[str, str]] = set()
        for number, scan in enumerate(self.joined.scans):
            if scan.shard not in keys_of_shard:
                continue
            rows = np.flatnonzero(self.pair_shard_N == number)
            keys = self.pair_key.take(rows).column
            hit = pc.is_in(keys, value_set=pa.array(keys_of_shard[scan.shard], pa.large_string()))
            hit = hit.to_numpy(zero_copy_only=False)
            self.use_N[rows[hit]] = False
            found.update((scan.shard, self.pair_key[int(row)]) for row in rows[hit])
        for shard, key in wanted:
            if (shard, key) not in found:
                detail = f"data.exclude names {key!r} of {shard}, which is no pair of this run"
                self.faults.append(Fault(shard, 0, "unknown_key", detail, 0))
        return before - int(self.use_N.sum())

    def columns(self) -> dict[str, Any]:
        use = np.flatnonzero(self.use_N)
        positives, negatives = self.positives.of(use), self.negatives.of(use)
        query_hash_N = self.query_hash_N[use]
        return {
            "corpus_C": self.corpus_C,
            "pair_key": self.pair_key.take(use),
            "pair_shard_N": self.pair_shard_N[use],
            "source_start_K1": np.searchsorted(self.source_N[use], np.arange(len(self.pages_K) + 1)).astype(np.int64),
            "query_N": self.query_N[use],
            "query_hash_N": query_hash_N,
            "by_query_hash_N": np.argsort(query_hash_N, kind="stable").astype(np.int64, copy=False),
            "positive_start_N1": positives.start_N1,
            "positives": positives.rows,
            "negative_start_N1": negatives.start_N1,
            "negatives": negatives.rows,
        }


class _PagesByKey:
    """Input rows of the documents in some corpus shards, by their keys."""

    def __init__(self, corpus: Sequence[ShardScan], joined: JoinedScans) -> None:
        self.keys = strings_of(corpus, "corpus_key").column
        self.row = joined.documents_of(corpus)
        counts_of_key = pc.value_counts(self.keys)
        self.twice = counts_of_key.filter(pc.greater(counts_of_key.field("counts"), 1)).field("values")

    def rows_of(self, keys: ArrowStrings, wanted: Bool) -> Int64:
        """Input rows of ``keys[wanted]``, -1 where there is no such page. Raises ``UserError`` where there are two."""
        named = keys.column.filter(pa.array(wanted))
        unclear = named.filter(pc.is_in(named, value_set=self.twice))
        if len(unclear):
            raise UserError(
                f"the page {unclear[0].as_py()!r} stands in the corpus shards twice, so it is not clear which one "
                "pairs mean; give each page a key of its own, or each source a corpus of its own"
            )
        place = pc.index_in(named, value_set=self.keys)
        place_n = place.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return np.append(self.row, -1)[place_n]


def _fingerprint(
    sources: Sequence[Source], scans: Sequence[ShardScan], use_N: Bool, positives: Int64, negatives: Int64
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    facts = [(short_name(scan.shard), scan.corpus, scan.size, scan.digest) for scan in scans]
    digest.update(json.dumps([[len(source.shards) for source in sources], facts]).encode())
    # What was left out, by what is left.
    for rows in (np.flatnonzero(use_N), positives, negatives):
        digest.update(f"{len(rows)}\n".encode())
        digest.update(rows.tobytes())
    return digest.hexdigest()
