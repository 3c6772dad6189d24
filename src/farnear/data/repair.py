"""Part the copies: no query and no page twice in one batch, by swaps between batches.

Rows that share a query hash form a group, rows that share a page hash form another. After a random shuffle only few
rows meet a member of their group in their own batch (about 2,000 of a million when each page has five queries), so each
of them is handled by itself: look up the batches that hold no member of its groups, pick one at random, and in that one
a row whose own groups are not in the batch we come from. Swapping those two takes conflicts away and adds none.

Where every batch is nearly full of copies no such swap may be free, and a group with more members than there are
batches cannot be parted at all. Those rows stay, and are counted.

Shapes: N pairs, S batches, G pairs in a batch, 2 groups of a row (its query's, its page's), K groups. A slot is a place
in the order; slot // G is its batch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

_BATCHES_TRIED = 16
_ROWS_TRIED_FIRST = 256


def part_copies(
    order_N: Int64, query_hash_N: Int64, page_hash_N: Int64, random_N: UInt64, global_batch_size: int
) -> tuple[int, int]:
    """Swap rows of ``order_N``, in place, until no batch of G consecutive ones holds a query or a page twice.

    ``random_N`` (64 random bits a row) picks among the possible swaps, so the result is a function of the arguments.
    Returns how many rows changed their batch, and how many are left in a batch that holds their query or page already.
    """
    groups = _find_groups(query_hash_N, page_hash_N)
    slot_N = np.empty(len(order_N), np.int64)
    slot_N[order_N] = np.arange(len(order_N))
    draft = _Draft(order_N, slot_N, global_batch_size)
    batch_before_N = draft.batch_of(slot_N)
    while _repair_once(draft, groups, random_N):
        pass
    batch_N = draft.batch_of(slot_N)
    _, repeated_N = _rows_in_conflict(batch_N, groups)
    return int(np.count_nonzero(batch_N != batch_before_N)), int(np.count_nonzero(repeated_N))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Rows that share a hash. The members of group k are ``member[start_K1[k] : start_K1[k + 1]]``, at least two.

    Group 0 stands for "no other row has this hash" and lists no members.
    """

    group_N2: Int64
    member: Int64
    start_K1: Int64

    def sizes(self) -> Int64:
        return np.diff(self.start_K1)

    def members_with(self, row: int) -> Int64:
        """All members of both groups of ``row``."""
        query_group, page_group = self.group_N2[row]
        start = self.start_K1
        return np.concatenate(
            (
                self.member[start[query_group] : start[query_group + 1]],
                self.member[start[page_group] : start[page_group + 1]],
            )
        )


def _find_groups(query_hash_N: Int64, page_hash_N: Int64) -> _Groups:
    group_N2 = np.zeros((len(query_hash_N), 2), np.int64)
    members, sizes = [], [np.zeros(1, np.int64)]
    groups = 0
    for kind, hash_N in enumerate((query_hash_N, page_hash_N)):
        by_hash_N = np.argsort(hash_N, kind="stable")
        starts_run = np.append(True, np.diff(hash_N[by_hash_N]) != 0)
        run_N = np.cumsum(starts_run) - 1
        rows_of_run = np.bincount(run_N)
        shared = rows_of_run > 1
        group_of_run = np.where(shared, np.cumsum(shared) + groups, 0)
        group_N2[by_hash_N, kind] = group_of_run[run_N]
        members.append(by_hash_N[shared[run_N]])
        sizes.append(rows_of_run[shared])
        groups += np.count_nonzero(shared)
    return _Groups(group_N2, np.concatenate(members), np.append(0, np.cumsum(np.concatenate(sizes))))


def _rows_in_conflict(batch_N: Int64, groups: _Groups) -> tuple[Bool, Bool]:
    """Which rows have a member of one of their groups in their batch, and which have one of a smaller row number."""
    group = np.repeat(np.arange(len(groups.start_K1) - 1), groups.sizes())
    batch = batch_N[groups.member]
    by_batch = np.lexsort((batch, group))
    group, batch, row = group[by_batch], batch[by_batch], groups.member[by_batch]
    meet = (np.diff(group) == 0) & (np.diff(batch) == 0)
    conflict_N, repeated_N = np.zeros(len(batch_N), np.bool_), np.zeros(len(batch_N), np.bool_)
    repeated_N[row[1:][meet]] = True
    conflict_N[row[1:][meet]] = conflict_N[row[:-1][meet]] = True
    return conflict_N, repeated_N


@dataclass(frozen=True, eq=False)
class _Draft:
    """The order while it changes: the row in each slot and, the other way round, the slot of each row."""

    order_N: Int64
    slot_N: Int64
    global_batch_size: int

    def batch_of(self, slots: Int64) -> Int64:
        return slots // self.global_batch_size

    def rows_of_batch(self, batch: int) -> Int64:
        return self.order_N[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]

    def swap(self, row: int, other: int) -> None:
        slot, other_slot = self.slot_N[row], self.slot_N[other]
        self.order_N[slot], self.order_N[other_slot] = other, row
        self.slot_N[row], self.slot_N[other] = other_slot, slot


def _repair_once(draft: _Draft, groups: _Groups, random_N: UInt64) -> int:
    """Go through all batches once and swap the rows in conflict where a swap is free; returns the number of swaps.

    Either row of a conflict may move, the later one is tried first. Every swap leaves fewer conflicts than before, so
    repeating this until nothing is swapped comes to an end.
    """
    batch_N = draft.batch_of(draft.slot_N)
    batches = int(batch_N.max(initial=-1)) + 1
    conflict_N, repeated_N = _rows_in_conflict(batch_N, groups)
    hopeless_K = groups.sizes() > batches
    mover = np.flatnonzero(conflict_N & ~hopeless_K[groups.group_N2].any(axis=1))
    mover = mover[np.lexsort((~repeated_N[mover], batch_N[mover]))]
    count_K = np.zeros(len(hopeless_K), np.int64)
    swaps = 0
    for rows_of_one_batch in np.split(mover, np.flatnonzero(np.diff(batch_N[mover])) + 1):
        if len(rows_of_one_batch) == 0:
            continue
        batch = int(batch_N[rows_of_one_batch[0]])
        np.add.at(count_K, groups.group_N2[draft.rows_of_batch(batch)], 1)
        count_K[0] = 0
        for row in rows_of_one_batch.tolist():
            # A row may have left already, in exchange for one of an earlier batch.
            if draft.slot_N[row] // draft.global_batch_size == batch:
                swaps += _move_out(draft, groups, count_K, row, int(random_N[row]), batches)
        count_K[groups.group_N2[draft.rows_of_batch(batch)]] = 0
    return swaps


def _move_out(draft: _Draft, groups: _Groups, count_K: Int64, row: int, random_bits: int, batches: int) -> bool:
    """Swap ``row`` into a batch without members of its groups; False if it meets none here, or no swap is free.

    ``count_K`` holds how many members of each group are in the batch of ``row`` (0 for group 0) and is kept so.
    """
    own_groups = groups.group_N2[row][groups.group_N2[row] > 0]
    if not (count_K[own_groups] > 1).any():
        return False
    possible_S = np.ones(batches, np.bool_)
    possible_S[draft.batch_of(draft.slot_N[groups.members_with(row)])] = False
    possible = np.flatnonzero(possible_S)
    count_K[own_groups] -= 1
    for attempt in range(min(len(possible), _BATCHES_TRIED)):
        target = int(possible[(random_bits + attempt) % len(possible)])
        other = _find_partner(draft.rows_of_batch(target), groups, count_K, random_bits >> 20)
        if other is not None:
            draft.swap(row, other)
            groups_of_other = groups.group_N2[other][groups.group_N2[other] > 0]
            count_K[groups_of_other] += 1
            return True
    count_K[own_groups] += 1
    return False


def _find_partner(row_G: Int64, groups: _Groups, count_K: Int64, random_bits: int) -> int | None:
    """A row of ``row_G`` whose groups all count 0. Nearly every row will do, so a small window is looked at first."""
    start = random_bits % len(row_G)
    for rows in (row_G[start : start + _ROWS_TRIED_FIRST], row_G):
        fits = (count_K[groups.group_N2[rows]] == 0).all(axis=1)
        if fits.any():
            return int(rows[fits.argmax()])
    return None
