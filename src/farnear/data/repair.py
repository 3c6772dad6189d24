"""Part the copies: no query and no page twice in one batch, by swaps between batches.

Items that share a query hash form a group, items that share a page hash form another. A swap is *free* if the item that
moves finds no member of its groups in the batch it goes to, and the other one none in the batch it comes to. Free swaps
take conflicts away and add none, so they may be made in any order. Three ways to find swaps follow each other:

- *Draw*: all items in conflict draw a partner each, and those swaps that are free and do not touch each other are made.
  A few rounds leave next to nothing. Of a million pairs with five queries a page, some 2,000 meet a copy in batches of
  1,024, and fifty times as many where shards are read in narrow windows.
- *Search*: what is left goes one by one through the batches that hold no member of its groups.
- *Walk*: where copies are so many that no swap is free, an item in conflict makes the best swap there is, if that
  leaves no more conflicts than before. So conflicts wander until they dissolve, or for so many steps.

An item is exchanged for one of its own source, so that batches keep their shares. It is rather one of its window of
shards or of a window near by, so that batches keep to few shards, and rather one of its pass, so that a pass shows
every pair once; where only an exchange between passes parts two copies, a pair comes earlier and another one later. A
group with more members than there are batches cannot be parted at all, and its members are not moved. What stays is
counted.

Shapes: X items of the epoch, S batches, C cells, 2 groups of an item (its query's, its page's), K groups, M items that
want to move. A slot is a place in the order. A cell is the slots that one pass of a source has in one batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from farnear.data.ranges import ranges

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

_WINDOWS_OF_PASS = 2**32  # more than a pass has
_WINDOWS_AROUND = (0, 2, _WINDOWS_OF_PASS // 2, 2**62)  # how far from its own window a partner is looked for in turn
_ROUNDS = 8
_FEW = 256  # items that are searched for one by one in no time
_CELLS_TRIED = 16
_ITEMS_TRIED_FIRST = 256
_SWEEPS_WALKED = 32  # over all items in conflict
_STEPS_WALKED = 2048  # about a millisecond each


@dataclass(frozen=True, eq=False)
class Layout:
    """The slots of an epoch: source after source, within a source step after step, in the order of its stream."""

    global_batch_size: int
    place_X: Int64  # of each slot in the plan: slot x belongs to batch place_X[x] // global_batch_size
    cell_start_C1: Int64  # the slots of cell c are cell_start_C1[c] : cell_start_C1[c + 1]; no cell is empty
    source_X: Int64  # number of each slot's source; does not decrease
    window_X: Int64  # number of the window that each slot was filled from, see window_number; does not decrease

    @cached_property
    def batch_X(self) -> Int64:
        return self.place_X // self.global_batch_size

    @cached_property
    def batch_C(self) -> Int64:
        return self.batch_X[self.cell_start_C1[:-1]]

    @cached_property
    def batches(self) -> int:
        return int(self.batch_C.max(initial=-1)) + 1

    def slots_near(self, slots: Int64, windows_around: int) -> tuple[Int64, Int64]:
        """The first slot of the same source and of the windows around that of each slot, and the one after the last."""
        window, source = self.window_X[slots], self.source_X[slots]
        return (
            np.maximum(
                np.searchsorted(self.source_X, source, "left"),
                np.searchsorted(self.window_X, window - windows_around, "left"),
            ),
            np.minimum(
                np.searchsorted(self.source_X, source, "right"),
                np.searchsorted(self.window_X, window + windows_around, "right"),
            ),
        )

    def slots_of_batch(self, batch: int) -> Int64:
        cells = np.flatnonzero(self.batch_C == batch)
        return np.concatenate([np.arange(*self.cell_start_C1[[cell, cell + 1]]) for cell in cells])


def window_number(of_pass: int, window_n: Int64) -> Int64:
    """Numbers of windows that are counted from 0 in each pass. Passes are counted over all sources."""
    return of_pass * _WINDOWS_OF_PASS + window_n


def part_copies(layout: Layout, query_hash_X: Int64, page_hash_X: Int64, random_X: UInt64) -> tuple[Int64, int, int]:
    """Exchange items between batches until no batch holds a query or a page twice.

    Items are numbered by the slot they come from; ``query_hash_X`` and ``page_hash_X`` say which of them are copies.
    ``random_X`` (64 random bits an item) picks among the possible swaps, so the result is a function of the arguments.
    Returns the item of each slot, how many items changed their batch, and how many are left in a batch that holds their
    query or page at an earlier place.
    """
    groups = _find_groups(query_hash_X, page_hash_X)
    draft = _Draft(layout, np.arange(len(query_hash_X)), np.arange(len(query_hash_X)))
    conflicts = _find_conflicts(draft, groups, np.arange(1, len(groups.start_K1) - 1))
    hopeless_K = groups.sizes() > layout.batches
    mover = _without(hopeless_K, conflicts.later, groups)
    for windows_around in _WINDOWS_AROUND:
        for attempt in range(_ROUNDS):
            if len(mover) > _FEW:
                mover = _draw(draft, groups, mover, windows_around, _other_bits(random_X, attempt))
    conflicts = _find_conflicts(draft, groups, conflicts.group)
    conflicts = _search_all(draft, groups, conflicts, hopeless_K, random_X)
    conflicts = _walk(draft, groups, conflicts, hopeless_K, random_X)
    conflicts = _search_all(draft, groups, conflicts, hopeless_K, random_X)
    masked = len(conflicts.later)
    return draft.item_X, int(np.count_nonzero(layout.batch_X[draft.slot_X] != layout.batch_X)), masked


@dataclass(frozen=True, eq=False)
class _Groups:
    """Items that share a hash. The members of group k are ``member[start_K1[k] : start_K1[k + 1]]``, at least two.

    Group 0 stands for "no other item has this hash" and lists no members.
    """

    group_X2: Int64
    member: Int64
    start_K1: Int64

    def sizes(self) -> Int64:
        return np.diff(self.start_K1)

    def members_of(self, groups: Int64) -> tuple[Int64, Int64]:
        """The members of several groups one after the other, and the group of each."""
        start, size = self.start_K1[groups], self.start_K1[groups + 1] - self.start_K1[groups]
        return self.member[ranges(start, size)], np.repeat(groups, size)


def _find_groups(query_hash_X: Int64, page_hash_X: Int64) -> _Groups:
    group_X2 = np.zeros((len(query_hash_X), 2), np.int64)
    members, sizes = [], [np.zeros(1, np.int64)]
    groups = 0
    for kind, hash_X in enumerate((query_hash_X, page_hash_X)):
        by_hash_X = np.argsort(hash_X, kind="stable")
        starts_run = np.append(True, np.diff(hash_X[by_hash_X]) != 0)
        run_X = np.cumsum(starts_run) - 1
        items_of_run = np.bincount(run_X)
        shared = items_of_run > 1
        group_of_run = np.where(shared, np.cumsum(shared) + groups, 0)
        group_X2[by_hash_X, kind] = group_of_run[run_X]
        members.append(by_hash_X[shared[run_X]])
        sizes.append(items_of_run[shared])
        groups += np.count_nonzero(shared)
    return _Groups(group_X2, np.concatenate(members), np.append(0, np.cumsum(np.concatenate(sizes))))


@dataclass(frozen=True, eq=False)
class _Draft:
    """The order while it changes: the item in each slot and, the other way round, the slot of each item."""

    layout: Layout
    item_X: Int64
    slot_X: Int64

    def batch_of(self, items: Int64) -> Int64:
        return self.layout.batch_X[self.slot_X[items]]

    def items_of_cell(self, cell: int) -> Int64:
        return self.item_X[self.layout.cell_start_C1[cell] : self.layout.cell_start_C1[cell + 1]]

    def cells_near(self, item: int, windows_around: int) -> tuple[int, int]:
        """The first cell of the same source and of the windows around that of ``item``, and the one after the last."""
        first_slot, stop_slot = self.layout.slots_near(self.slot_X[item], windows_around)
        first, last = np.searchsorted(self.layout.cell_start_C1, (first_slot, stop_slot - 1), "right") - 1
        return int(first), int(last) + 1

    def swap(self, items: Int64, others: Int64) -> None:
        slots, other_slots = self.slot_X[items], self.slot_X[others]
        self.item_X[slots], self.item_X[other_slots] = others, items
        self.slot_X[items], self.slot_X[others] = other_slots, slots


@dataclass(frozen=True, eq=False)
class _Conflicts:
    group: Int64  # groups with two members in one batch
    item: Int64  # those members
    later: Int64  # those of them that have the other one at an earlier place


def _find_conflicts(draft: _Draft, groups: _Groups, among: Int64) -> _Conflicts:
    """The conflicts of the groups ``among``. Repair adds none, so what had conflicts before is enough."""
    member, group = groups.members_of(among)
    key = group * draft.layout.batches + draft.batch_of(member)
    in_order = np.sort(key)
    twice = np.unique(in_order[1:][np.diff(in_order) == 0])
    found = np.flatnonzero(_is_in(twice, key))
    found = found[np.lexsort((draft.layout.place_X[draft.slot_X[member[found]]], key[found]))]
    later = np.diff(key[found], prepend=-1) == 0
    return _Conflicts(np.unique(group[found]), np.unique(member[found]), np.unique(member[found[later]]))


def _is_in(sorted_values: Int64, values: Int64) -> Bool:
    if len(sorted_values) == 0:
        return np.zeros(values.shape, np.bool_)
    return sorted_values[np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)] == values


def _without(hopeless_K: Bool, items: Int64, groups: _Groups) -> Int64:
    return items[~hopeless_K[groups.group_X2[items]].any(axis=1)]


def _other_bits(random_X: UInt64, attempt: int) -> UInt64:
    """32 bits for each round from the same 64 (multiplicative hashing; Knuth, TAOCP 6.4)."""
    return (random_X ^ np.uint64(attempt)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)


def _draw(draft: _Draft, groups: _Groups, mover: Int64, windows_around: int, bits_X: UInt64) -> Int64:
    """Have each of ``mover`` draw a partner from the windows around, and swap where that is free; returns who is left.

    The swaps that are made share no slot, and no two of them bring members of a group to the same batch: so each is
    free whatever the others do. ``bits_X`` are 32 random bits an item.
    """
    batch_X, batches = draft.layout.batch_X, draft.layout.batches
    member, group = groups.members_of(np.arange(1, len(groups.start_K1) - 1))
    taken = np.sort(group * batches + draft.batch_of(member))
    here_M2 = groups.group_X2[mover] * batches + draft.batch_of(mover)[:, None]
    alone_M2 = np.searchsorted(taken, here_M2, "right") - np.searchsorted(taken, here_M2, "left") < 2
    mover = mover[~alone_M2.all(axis=1)]
    slot_M, group_M2 = draft.slot_X[mover], groups.group_X2[mover]
    first_M, stop_M = draft.layout.slots_near(slot_M, windows_around)
    other_slot_M = first_M + (bits_X[mover] * (stop_M - first_M).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    other_M = draft.item_X[other_slot_M]
    shared_M4 = np.hstack((group_M2, groups.group_X2[other_M])) > 0
    arrival_M4 = np.hstack(
        (
            group_M2 * batches + batch_X[other_slot_M, None],
            groups.group_X2[other_M] * batches + batch_X[slot_M, None],
        )
    )
    meets_M = (shared_M4 & _is_in(taken, arrival_M4)).any(axis=1)
    free = np.flatnonzero(~meets_M & (batch_X[slot_M] != batch_X[other_slot_M]))
    # What a swap touches: two slots, and each (group, batch) it brings a member to. The first one to touch a thing has
    # it. Slots are negative here, to differ from the rest; one that is named twice by the same swap does no harm.
    slot_M2 = -1 - np.stack((slot_M, other_slot_M), axis=1)
    touched = np.hstack((slot_M2, np.where(shared_M4, arrival_M4, slot_M2[:, :1])))[free]
    _, first, which = np.unique(touched, return_index=True, return_inverse=True)
    first_swap = first[which].reshape(touched.shape) // touched.shape[1]
    made = free[(first_swap == np.arange(len(free))[:, None]).all(axis=1)]
    draft.swap(mover[made], other_M[made])
    return np.delete(mover, made)


def _search_all(
    draft: _Draft, groups: _Groups, conflicts: _Conflicts, hopeless_K: Bool, random_X: UInt64
) -> _Conflicts:
    while _search(draft, groups, conflicts, hopeless_K, random_X):
        conflicts = _find_conflicts(draft, groups, conflicts.group)
    return conflicts


def _search(draft: _Draft, groups: _Groups, conflicts: _Conflicts, hopeless_K: Bool, random_X: UInt64) -> int:
    """Go through the items in conflict, batch by batch, and swap where a swap is free; returns the number of swaps.

    Either item of a conflict may move, the later one is tried first. Every swap leaves fewer conflicts than before, so
    repeating this until nothing is swapped comes to an end.
    """
    mover = _without(hopeless_K, conflicts.item, groups)
    mover = mover[np.lexsort((~np.isin(mover, conflicts.later), draft.batch_of(mover)))]
    batch_M = draft.batch_of(mover)
    count_K = np.zeros(len(hopeless_K), np.int64)
    swaps = 0
    for batch in np.unique(batch_M).tolist():
        slots = draft.layout.slots_of_batch(batch)
        np.add.at(count_K, groups.group_X2[draft.item_X[slots]], 1)
        count_K[0] = 0
        for item in mover[batch_M == batch].tolist():
            # An item may have left already, in exchange for one of an earlier batch.
            if draft.layout.batch_X[draft.slot_X[item]] == batch:
                swaps += _move_out(draft, groups, count_K, item, int(random_X[item]))
        count_K[groups.group_X2[draft.item_X[slots]]] = 0
    return swaps


def _move_out(draft: _Draft, groups: _Groups, count_K: Int64, item: int, random_bits: int) -> bool:
    """Swap ``item`` into a batch without members of its groups; False if it meets none here, or no swap is free.

    ``count_K`` holds how many members of each group are in the batch of ``item`` (0 for group 0) and is kept so.
    """
    own_groups = groups.group_X2[item][groups.group_X2[item] > 0]
    if not (count_K[own_groups] > 1).any():
        return False
    possible_S = np.ones(draft.layout.batches, np.bool_)
    possible_S[draft.batch_of(groups.members_of(own_groups)[0])] = False
    possible_C = possible_S[draft.layout.batch_C]
    count_K[own_groups] -= 1
    for windows_around in _WINDOWS_AROUND:
        first_cell, stop_cell = draft.cells_near(item, windows_around)
        cells = first_cell + np.flatnonzero(possible_C[first_cell:stop_cell])
        for attempt in range(min(len(cells), _CELLS_TRIED)):
            cell = int(cells[(random_bits + attempt) % len(cells)])
            other = _find_partner(draft.items_of_cell(cell), groups, count_K, random_bits >> 20)
            if other is not None:
                draft.swap(np.array([item]), np.array([other]))
                count_K[groups.group_X2[other][groups.group_X2[other] > 0]] += 1
                return True
    count_K[own_groups] += 1
    return False


def _find_partner(items: Int64, groups: _Groups, count_K: Int64, random_bits: int) -> int | None:
    """One of ``items`` whose groups all count 0. Nearly every one will do, so a few are looked at first."""
    start = random_bits % len(items)
    for some in (items[start : start + _ITEMS_TRIED_FIRST], items):
        fits = (count_K[groups.group_X2[some]] == 0).all(axis=1)
        if fits.any():
            return int(some[fits.argmax()])
    return None


def _walk(draft: _Draft, groups: _Groups, conflicts: _Conflicts, hopeless_K: Bool, random_X: UInt64) -> _Conflicts:
    """Let conflicts wander by swaps that leave no more of them than before; returns those that are left.

    The min-conflicts heuristic (S. Minton et al., Artificial Intelligence 58, 1992), with a bound on its steps.
    """
    count_2K = np.zeros((2, len(hopeless_K)), np.int64)
    steps = 0
    for sweep in range(_SWEEPS_WALKED):
        mover = _without(hopeless_K, conflicts.item, groups)[: _STEPS_WALKED - steps]
        if len(mover) == 0:
            break
        touched = [conflicts.group]
        for item, bits in zip(mover.tolist(), _other_bits(random_X[mover], sweep).tolist(), strict=True):
            other = _best_partner(draft, groups, count_2K, item, bits)
            if other is not None:
                draft.swap(np.array([item]), np.array([other]))
                touched += [groups.group_X2[item], groups.group_X2[other]]
        steps += len(mover)
        conflicts = _find_conflicts(draft, groups, np.setdiff1d(np.concatenate(touched), [0]))
    return conflicts


def _best_partner(draft: _Draft, groups: _Groups, count_2K: Int64, item: int, random_bits: int) -> int | None:
    """The item, in some cells near by, for which ``item`` is best exchanged; None if that always adds a conflict.

    A batch with n members of a group has n - 1 conflicts of it. ``count_2K`` is room for counting, all zero.
    """
    here_K, there_K = count_2K
    layout, own_groups = draft.layout, groups.group_X2[item]
    batch = int(draft.layout.batch_X[draft.slot_X[item]])
    slots = layout.slots_of_batch(batch)
    np.add.at(here_K, groups.group_X2[draft.item_X[slots]], 1)
    here_K[0] = 0
    best, fewest_added = None, 1
    first_cell, stop_cell = draft.cells_near(item, _WINDOWS_AROUND[1])
    cells = first_cell + np.flatnonzero(layout.batch_C[first_cell:stop_cell] != batch)
    for attempt in range(min(len(cells), _CELLS_TRIED) if (here_K[own_groups] > 1).any() else 0):
        cell = int(cells[(random_bits + attempt) % len(cells)])
        other_slots = layout.slots_of_batch(int(layout.batch_C[cell]))
        np.add.at(there_K, groups.group_X2[draft.item_X[other_slots]], 1)
        there_K[0] = 0
        items = np.roll(draft.items_of_cell(cell), random_bits >> 8)
        groups_M2 = groups.group_X2[items]
        added_M2 = (here_K[groups_M2] > 0) * 1 - (there_K[groups_M2] > 1) + (there_K[own_groups] > 0)
        added_M2 -= here_K[own_groups] > 1
        # Members of one group that change places leave all as it was.
        added_M = np.where(groups_M2 == own_groups, 0, added_M2).sum(axis=1)
        there_K[groups.group_X2[draft.item_X[other_slots]]] = 0
        if added_M.min() < fewest_added:
            best, fewest_added = int(items[added_M.argmin()]), int(added_M.min())
    here_K[groups.group_X2[draft.item_X[slots]]] = 0
    return best
