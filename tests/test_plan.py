"""The plan: every pair once, equal steps, no copies in a batch, the same everywhere for ever."""

import hashlib
import random
import time

import numpy as np
import pytest

from farnear.data.plan import Int64, Plan, plan_epoch, plan_hash, slice_of_rank, steps_per_epoch


def plan(query: Int64, page: Int64, batch: int, *, seed: int = 0, epoch: int = 0, fingerprint: str = "f") -> Plan:
    return plan_epoch(query, page, fingerprint=fingerprint, seed=seed, epoch=epoch, global_batch_size=batch)


def distinct(pairs: int) -> tuple[Int64, Int64]:
    return np.arange(pairs), np.arange(pairs)


def with_copies(rng: random.Random, pairs: int, most_copies: int) -> Int64:
    """Hashes of ``pairs`` rows in random order, each hash on 1 to ``most_copies`` of them."""
    hashes: list[int] = []
    while len(hashes) < pairs:
        hashes += [rng.getrandbits(63) - 2**62] * rng.randint(1, most_copies)
    hashes = hashes[:pairs]
    rng.shuffle(hashes)
    return np.array(hashes, np.int64)


def masked_by_brute_force(rows_SG: Int64, query: Int64, page: Int64) -> int:
    """Rows that come after a row of the same query or page in their batch, counted one by one in order of rows."""
    masked = 0
    for row_G in rows_SG:
        queries, pages = set(), set()
        for row in sorted(row_G[row_G >= 0]):
            masked += query[row] in queries or page[row] in pages
            queries.add(query[row])
            pages.add(page[row])
    return masked


def random_cases(count: int) -> list[tuple[int, random.Random]]:
    return [(seed, random.Random(seed)) for seed in range(count)]


def test_every_pair_exactly_once_in_equal_steps() -> None:
    for seed, rng in random_cases(150):
        pairs, batch, copies = rng.randint(1, 300), rng.randint(1, 70), rng.randint(1, 6)
        query, page = with_copies(rng, pairs, copies), with_copies(rng, pairs, copies)
        rows_SG = plan(query, page, batch, seed=seed, epoch=rng.randint(0, 3)).rows_SG
        assert rows_SG.shape == (steps_per_epoch(pairs, batch), batch)
        assert rows_SG.dtype == np.int64
        flat = rows_SG.ravel()
        assert sorted(flat[:pairs]) == list(range(pairs))
        assert (flat[pairs:] == -1).all() and len(flat) - pairs < batch


def test_ranks_deal_a_batch_out_evenly() -> None:
    for _, rng in random_cases(150):
        pairs, batch, world_size = rng.randint(1, 200), rng.randint(1, 70), rng.randint(1, 9)
        for row_G in plan(*distinct(pairs), batch).rows_SG:
            slices = [slice_of_rank(row_G, rank, world_size) for rank in range(world_size)]
            assert np.concatenate(slices).tolist() == row_G[row_G >= 0].tolist()
            sizes = [len(rows) for rows in slices]
            assert max(sizes) - min(sizes) <= 1
    assert [len(slice_of_rank(np.array([5, 7, -1]), rank, 4)) for rank in range(4)] == [0, 1, 0, 1]


def test_no_query_and_no_page_twice_in_a_batch() -> None:
    moved = 0
    for seed, rng in random_cases(60):
        batch, steps = rng.randint(8, 40), rng.randint(6, 20)
        pairs = batch * steps - rng.randint(0, batch - 1)
        query, page = with_copies(rng, pairs, 3), with_copies(rng, pairs, 3)
        result = plan(query, page, batch, seed=seed)
        assert masked_by_brute_force(result.rows_SG, query, page) == result.masked == 0
        moved += result.moved
    assert moved > 500


def test_a_page_of_every_batch_is_spread_over_all() -> None:
    """The tight case that small sets have: four queries a page, four steps. One pass over the batches is not enough."""
    page = np.arange(2048) // 4
    result = plan(np.arange(2048), page, 512, fingerprint="x")
    assert result.masked == 0
    assert all(sorted(page[row_G]) == list(range(512)) for row_G in result.rows_SG)


def test_what_cannot_be_parted_is_counted_and_disturbs_nothing_else() -> None:
    for seed, rng in random_cases(40):
        batch, steps = rng.randint(10, 30), rng.randint(4, 8)
        pairs = batch * steps
        query, page = with_copies(rng, pairs, 2), with_copies(rng, pairs, 2)
        many = steps + rng.randint(1, batch)
        query[rng.sample(range(pairs), many)] = 42
        result = plan(query, page, batch, seed=seed)
        assert result.masked == masked_by_brute_force(result.rows_SG, query, page)
        assert many - steps <= result.masked
        for row_G in result.rows_SG:
            free = row_G[query[row_G] != 42]
            assert len(set(query[free])) == len(free)
            assert not any(np.count_nonzero(page[row_G] == page[row]) > 1 for row in free)


def test_a_set_of_one_query_stays_as_it_is() -> None:
    result = plan(np.zeros(100, np.int64), np.arange(100), 10)
    assert (result.moved, result.masked) == (0, 90)


def test_swaps_only_where_a_batch_holds_copies() -> None:
    for seed in range(20):
        before = plan(*distinct(400), 40, seed=seed)
        assert (before.moved, before.masked) == (0, 0)
        page = np.arange(400)
        page[:40] //= 2
        after = plan(np.arange(400), page, 40, seed=seed)
        assert np.count_nonzero((before.rows_SG != after.rows_SG).ravel()) == after.moved <= 40


def test_seed_epoch_and_fingerprint_each_change_the_order() -> None:
    plans = [
        plan(*distinct(200), 16, seed=seed, epoch=epoch, fingerprint=fingerprint)
        for seed, epoch, fingerprint in [(0, 0, "f"), (1, 0, "f"), (0, 1, "f"), (0, 0, "g"), (0, 0, "f")]
    ]
    hashes = [plan_hash(result) for result in plans]
    assert len(set(hashes[:4])) == 4
    assert hashes[4] == hashes[0]


def splitmix64(state: int) -> int:
    """The reference in plain integers: the first output of the generator that starts at ``state``."""
    word = (state + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_order_is_that_of_splitmix64_keys() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # known first output for seed 0
    state = int.from_bytes(hashlib.blake2b(b"f/5/7", digest_size=8).digest(), "little")
    keys = [splitmix64((state + row * 0x9E3779B97F4A7C15) % 2**64) for row in range(300)]
    expected = sorted(range(300), key=keys.__getitem__)
    assert plan(*distinct(300), 300, seed=5, epoch=7).rows_SG[0].tolist() == expected


def test_order_is_not_biased() -> None:
    """Over many epochs a pair's mean step is the middle one, within five standard errors."""
    steps = np.array([np.argsort(plan(*distinct(64), 64, epoch=epoch).rows_SG[0]) for epoch in range(400)])
    standard_error = 64 / np.sqrt(12 * 400)
    assert np.abs(steps.mean(axis=0) - 31.5).max() < 5 * standard_error


def test_golden_plan() -> None:
    """If this fails, every run that is resumed would see another order: do not change the value, find the cause."""
    page = np.arange(1000) // 5
    result = plan(np.arange(1000) % 700, page, 64, seed=3, epoch=2, fingerprint="00ff")
    assert plan_hash(result) == "f1732f0c446b8ffbcc478ded84a02003"
    assert (result.moved, result.masked) == (222, 0)


def test_small_sets() -> None:
    assert plan(*distinct(3), 8).rows_SG.shape == (1, 8)
    assert plan(np.zeros(2, np.int64), np.zeros(2, np.int64), 8).masked == 1
    assert steps_per_epoch(8, 8) == 1 and steps_per_epoch(9, 8) == 2


@pytest.mark.parametrize("kind", ["copies", "five queries a page"])
def test_a_million_pairs_take_seconds(kind: str) -> None:
    pairs = 1_000_000
    rng = np.random.default_rng(0)
    query, page = np.arange(pairs), np.arange(pairs) // (5 if kind == "five queries a page" else 1)
    query[rng.choice(pairs, pairs // 20, replace=False)] = rng.integers(0, pairs, pairs // 20)
    seconds = time.process_time()
    result = plan(query, page, 1024)
    assert time.process_time() - seconds < 5
    assert result.moved > 0 and result.masked == 0
