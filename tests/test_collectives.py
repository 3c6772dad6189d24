"""What ranks exchange: rows of unequal numbers and several types in one go, and back to their owners as sums."""

import torch
import torch.distributed as dist
from exactness import run_config
from ranks import run_ranks

from farnear.parallel.collectives import exchange_ints, gather_together, reduce_to_owners, row_weight
from farnear.parallel.world import start_world, stop_world

ROWS = [(3, 0), (1, 2), (4, 5)]


def rows_of(rank: int) -> list[torch.Tensor]:
    """Tensors of 8, 1 and 4 bytes an element, with row counts of their own."""
    n, m = ROWS[rank]
    return [
        torch.arange(n * 2, dtype=torch.int64).view(n, 2) + 2**40 * (rank + 1),
        torch.full((m, 3), rank % 2 == 1, dtype=torch.bool),
        torch.arange(n * 5, dtype=torch.float32).view(n, 5) / 7 + rank,
    ]


def exchange(rank: int, world_size: int) -> None:
    world = start_world(run_config("ddp", "unused", 1.0))
    assert exchange_ints([rank, 10 * rank], world.device) == [[r, 10 * r] for r in range(world_size)]
    rows_Wt = [(n, m, n) for n, m in ROWS]
    gathered = gather_together(rows_of(rank), rows_Wt)
    for t, tensor in enumerate(gathered):
        assert torch.equal(tensor, torch.cat([rows_of(r)[t] for r in range(world_size)]))
    # Each rank says its own number about all rows; an owner gets the sum.
    n_total, m_total = (sum(column) for column in zip(*ROWS, strict=True))
    about = [torch.arange(n_total * 2.0).view(n_total, 2) * (rank + 1), torch.full((m_total, 3), float(rank))]
    (own_n, own_m), sums = reduce_to_owners(about, ROWS, torch.tensor([1.0, float(rank)]))
    first = sum(n for n, _ in ROWS[:rank])
    assert torch.equal(own_n, torch.arange(n_total * 2.0).view(n_total, 2)[first : first + ROWS[rank][0]] * 6)
    assert torch.equal(own_m, torch.full((ROWS[rank][1], 3), 3.0))
    assert sums.tolist() == [3.0, 3.0]
    assert row_weight(6) == 0.5
    stop_world()


def test_unequal_rows_arrive_in_rank_order_and_their_sums_at_home() -> None:
    run_ranks(exchange, 3)


def test_one_rank_alone_keeps_what_it_has() -> None:
    assert not dist.is_initialized()
    tensors = rows_of(0)
    assert gather_together(tensors, [(3, 0, 3)]) == tensors
    own, sums = reduce_to_owners([tensors[2]], [(3,)], torch.tensor([5.0]))
    assert torch.equal(own[0], tensors[2]) and sums.tolist() == [5.0]
    assert exchange_ints([4, 2], torch.device("cpu")) == [[4, 2]]
