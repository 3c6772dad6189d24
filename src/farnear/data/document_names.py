"""What documents and shards are called in files that outlive an index: rows are only of one index, names of any.

A document of a corpus shard goes by its key, as the pairs name it in `pos_id` and `neg_ids`. One that stands with a
pair, and one whose key stands in several corpus shards, goes by ``SHARD/MEMBER`` of its first part, which is what
`Index.input_id` tells people. The two are never confused: a member's name ends with an extension, a key does not.

Shapes: S shards, R documents, n names.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from farnear.data.columns import ArrowStrings
from farnear.data.index import Index
from farnear.data.remote import short_name, shown

Int64 = npt.NDArray[np.int64]

# As `farnear.data.sample.split_name` and the scan of a corpus shard make a key of a member's name.
_KEY_OF_MEMBER = r"^(?P<key>(?:.*/)?[^/.]+)\.(?:(?P<neg>[nN][eE][gG])0*(?P<number>\d+)\.)?.*$"


class DocumentNames:
    """The documents of an index by name: those of its pairs and of its corpus shards."""

    def __init__(self, index: Index) -> None:
        self.row_R = index.documents()
        part_R = index.part_start_I1[self.row_R]
        member_R = index.part_name.take(part_R).column
        shard_R = pa.array(shard_names(index), pa.large_string()).take(pa.array(index.part_shard_M[part_R]))
        place_R = pc.binary_join_element_wise(shard_R, member_R, pa.scalar("/", pa.large_string()))
        of_corpus_R = pa.array(np.isin(self.row_R, index.corpus_C))
        key_R = pc.if_else(of_corpus_R, _keys_of(member_R), pa.scalar(None, pa.large_string()))
        counts = pc.value_counts(key_R.drop_null())
        shared = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        key_R = pc.if_else(pc.is_in(key_R, value_set=shared), pa.scalar(None, pa.large_string()), key_R)
        self._name_R = pc.coalesce(key_R, place_R)
        # A document of a corpus shard is found by its place too.
        self._known = pa.concat_arrays([self._name_R, place_R])

    def names(self, rows_n: Int64) -> ArrowStrings:
        """What the documents ``rows_n`` are called."""
        return ArrowStrings(self._name_R.take(pa.array(np.searchsorted(self.row_R, rows_n))))

    def rows(self, names_n: pa.LargeStringArray) -> Int64:
        """The input row of each name, -1 where there is no such document."""
        place_n = pc.index_in(names_n, value_set=self._known).fill_null(-1).to_numpy(zero_copy_only=False)
        return np.append(np.tile(self.row_R, 2), -1)[place_n]


def shard_names(index: Index) -> list[str]:
    """`Index.shard_name` of every shard, told at once: of tens of thousands it takes no time."""
    distinct = set(index.shards)
    shared = Counter(map(short_name, distinct))
    return [short_name(shard) if shared[short_name(shard)] == 1 else shown(shard) for shard in index.shards]


def pair_rows(index: Index, shards_n: pa.LargeStringArray, keys_n: pa.LargeStringArray) -> Int64:
    """The pair of each (shard, key), -1 where there is none. A shard is named by its whole path too."""
    number_of: dict[str, int] = {}
    names = shard_names(index)
    for shard in np.flatnonzero(index.shard_source_S >= 0).tolist():
        number_of |= {names[shard]: shard, shown(index.shards[shard]): shard}
    known = pa.array(list(number_of), pa.large_string())
    place_n = pc.index_in(shards_n, value_set=known).fill_null(-1).to_numpy(zero_copy_only=False)
    shard_n = np.append(np.array(list(number_of.values()), np.int64), -1)[place_n]
    asked_n, known_N = _joined(shard_n, keys_n), _joined(index.pair_shard_N, index.pair_key.column)
    row_n: Int64 = pc.index_in(asked_n, value_set=known_N).fill_null(-1).to_numpy(zero_copy_only=False)
    return row_n.astype(np.int64)


def _joined(numbers: npt.NDArray[np.int64] | npt.NDArray[np.int32], keys: pa.LargeStringArray) -> pa.LargeStringArray:
    text = pc.cast(pa.array(numbers), pa.large_string())
    return pc.binary_join_element_wise(text, keys, pa.scalar("/", pa.large_string()))


def _keys_of(member_R: pa.LargeStringArray) -> pa.LargeStringArray:
    found = pc.extract_regex(pc.replace_substring_regex(member_R, r"^\./", ""), _KEY_OF_MEMBER)
    key_R, neg_R, number_R = (found.field(name).cast(pa.large_string()) for name in ("key", "neg", "number"))
    dotted = pc.binary_join_element_wise(
        key_R, pc.binary_join_element_wise(pc.utf8_lower(neg_R), number_R, pa.scalar("", pa.large_string())),
        pa.scalar(".", pa.large_string()),
    )  # fmt: skip
    return pc.if_else(pc.equal(neg_R, ""), key_R, dotted)
