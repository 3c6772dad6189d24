"""What a step of the cached gradient has to send at least, from first principles, and where farnear sends more.

Of W ranks with n bytes each, in a ring: everyone's n reach everyone else with (W - 1) n sent by each rank; a sum of n
bytes that is left in W parts takes (W - 1) n / W; one that everybody has whole, twice that. No way of doing it sends
less as a mean over ranks. A step then needs

    exchange      an all-gather of a rank's page embeddings, 4 D bytes a page, and a reduce-scatter of their gradients
    update        ddp             an all-reduce of the gradient, 4 bytes a trained parameter
                  zero1, zero2    a reduce-scatter of it, and an all-gather of the updated weights
                  zero3, fsdp2    a reduce-scatter
    gathers       zero3, fsdp2    an all-gather of the weights that a pass goes through, for every forward and backward;
                                  of all weights once a step under ``reshard: step``

The passes of M mini-batches of a side, k of which keep their graph and T of which share a forward in pass one, are
(M - k) / T + k forwards in pass one, M - k in pass two, and M backwards. Queries go through the language model alone.

farnear sends more than that in two places, and less in a third. Under zero1 and zero2 DeepSpeed reduces its buckets by
an all-reduce, of which every rank throws the most away: three halves of the least. Under zero3 it gathers ahead what
came next the last time, which is in vain where the mini-batches change from pages to queries. fsdp2 keeps what stands
outside the blocks (the token embedding, for one) from pass one through to the first backward, and from each later
forward to its backward.

With ``shard_within: node`` the S ranks of a node share a copy of the model: gathers and the reduce-scatter stay inside
it, and each rank's 1/S of the gradient is all-reduced over the nodes.
"""

from dataclasses import dataclass

FP32 = 4


@dataclass(frozen=True)
class Passes:
    """How often a step goes through a model for one side.

    Attributes:
        mini_batches: M.
        kept: k, those whose graph is kept.
        together: T.
    """

    mini_batches: int
    kept: int = 0
    together: int = 1

    @property
    def first_forwards(self) -> int:
        """Of pass one."""
        return -(-(self.mini_batches - self.kept) // self.together) + self.kept

    @property
    def forwards(self) -> int:
        """Of both passes."""
        return self.first_forwards + self.mini_batches - self.kept

    @property
    def backwards(self) -> int:
        """One a mini-batch."""
        return self.mini_batches

    @property
    def learning(self) -> int:
        """Forwards and backwards in which DeepSpeed does not know what comes next, where no graph is kept."""
        return min(self.first_forwards, 2) + 2 * min(self.mini_batches, 2)


@dataclass(frozen=True)
class Weights:
    """Elements of a model, or how many gathers bring them.

    Attributes:
        text_blocks, vision_blocks: In the transformer blocks of the language model and the vision tower.
        text_rest, vision_rest: What stands outside of them.
    """

    text_blocks: int
    vision_blocks: int
    text_rest: int
    vision_rest: int

    @property
    def of_page(self) -> int:
        """All."""
        return self.of_query + self.vision_blocks + self.vision_rest

    @property
    def of_query(self) -> int:
        """The language model."""
        return self.text_blocks + self.text_rest

    def gathered(self, pages: Passes, queries: Passes) -> int:
        """Sum over all passes of what each goes through."""
        of_pages = (pages.forwards + pages.backwards) * self.of_page
        return of_pages + (queries.forwards + queries.backwards) * self.of_query

    def gathered_by_fsdp2(self, pages: Passes, queries: Passes) -> int:
        """The same where the rest, all of it in one unit, comes once for each backward."""
        blocks = Weights(self.text_blocks, self.vision_blocks, 0, 0).gathered(pages, queries)
        return blocks + (pages.backwards + queries.backwards) * (self.text_rest + self.vision_rest)


def gathering(own_bytes: float, ranks: int) -> float:
    """Sent by each rank so that all have everyone's bytes."""
    return (ranks - 1) * own_bytes


def reducing(whole_bytes: float, ranks: int) -> float:
    """Sent by each rank so that each has a W-th of the sum."""
    return (ranks - 1) * whole_bytes / ranks


def least_exchange(pages_per_rank: float, width: int, ranks: int) -> float:
    """Embeddings out, their gradients back."""
    own_bytes = FP32 * width * pages_per_rank
    return gathering(own_bytes, ranks) + reducing(ranks * own_bytes, ranks)


def least_update(strategy: str, trained: int, ranks: int, ranks_of_copy: int | None = None) -> float:
    """The gradient's way, and under zero1 and zero2 that of the updated weights."""
    if ranks_of_copy is not None and ranks_of_copy < ranks:
        part = FP32 * trained / ranks_of_copy
        return reducing(FP32 * trained, ranks_of_copy) + 2 * reducing(part, ranks // ranks_of_copy)
    return (2 if strategy.startswith(("ddp", "zero1", "zero2")) else 1) * reducing(FP32 * trained, ranks)
