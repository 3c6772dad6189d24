"""Which places of the score matrix are no negatives, found by their keys and without looking at every place.

A batch is repaired before it is dealt, so that it holds hardly any query or page twice. What is left, and what stands
in it as a hard negative of another query, would be pushed away from a query that it answers. Comparing every row with
every column would cost more than the loss of some dimensions and as much memory as the scores; rows and columns that
share a key are few, and a sorted list of the columns' keys finds them.

A place is masked where the two are known to belong together: the page has the content of the row's page or is another
answer to its query, or both ask the same query. The same is asked in all four directions. A row's own positive, the
place that the loss pulls near, is never masked; a query against itself, and a page against its own pair's documents,
always are.

Shapes: B pairs and N documents of the whole batch, b pairs of this rank, t rows of a tile, m answers of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farnear.sections import Direction


@dataclass(frozen=True)
class BatchFacts:
    """What is known of the pairs and documents of the whole batch beside their embeddings.

    Attributes:
        query_hash_B: int64, content of each pair's query.
        pair_valid_B: bool; False where the place holds no pair.
        answers_Bm: int64, contents of the pages that answer each query, its own positive among them. Rows with fewer
            repeat one.
        positive_B: int64, the document that is each pair's positive.
        page_hash_N: int64, content of each document.
        owner_N: int64, the pair whose positive or hard negative it is; -1 where a loss of the user's own is called
            without that pair.
        page_valid_N: bool; False where the place holds no document.
    """

    query_hash_B: Tensor
    pair_valid_B: Tensor
    answers_Bm: Tensor
    positive_B: Tensor
    page_hash_N: Tensor
    owner_N: Tensor
    page_valid_N: Tensor


Rule = tuple[Tensor, Tensor, Tensor]
"""Keys [b, m] of the rows, keys [c] that are looked for, and the column that each of those stands for."""


@dataclass(frozen=True)
class Places:
    """Places of the score matrix in one direction, tile by tile.

    Attributes:
        own_column_b: The column of each row's positive, which is never among them; None where there is no such column.
        rules: A place is one where any rule has a key in common. The keys that are looked for are sorted.
    """

    own_column_b: Tensor | None
    rules: tuple[Rule, ...]

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(row within the tile, column) of every place; int64, a place may come more than once."""
        found = [_matches(keys_bm[rows], keys_c, column_c) for keys_bm, keys_c, column_c in self.rules]
        row_n, column_n = (torch.cat(part) for part in zip(*found, strict=True))
        if self.own_column_b is not None:
            is_other_n = column_n != self.own_column_b[rows][row_n]
            row_n, column_n = row_n[is_other_n], column_n[is_other_n]
        return row_n, column_n


def false_negatives(direction: Direction, facts: BatchFacts, rows: slice) -> Places:
    """What must not count as a negative in one direction, for the pairs ``rows`` of the batch, this rank's."""
    pair_B = torch.arange(len(facts.query_hash_B), device=facts.query_hash_B.device)
    document_N = torch.arange(len(facts.page_hash_N), device=pair_B.device)
    page_hash_B = facts.page_hash_N[facts.positive_B]
    page_b1, query_b1, answers_bm = page_hash_B[rows, None], facts.query_hash_B[rows, None], facts.answers_Bm[rows]
    # Each answer of a query as a key of its pair.
    pair_of_answer = pair_B[:, None].expand_as(facts.answers_Bm).flatten()
    same_query = (query_b1, facts.query_hash_B)
    asked_by_others = (page_b1, facts.answers_Bm.flatten())
    rules: Sequence[Rule]
    if direction == "query_to_doc":
        own = facts.positive_B[rows]
        rules = ((answers_bm, facts.page_hash_N, document_N), (*same_query, facts.positive_B))
    elif direction == "doc_to_query":
        own = pair_B[rows]
        rules = ((*asked_by_others, pair_of_answer), (*same_query, pair_B))
    elif direction == "query_to_query":
        own = None
        rules = ((*same_query, pair_B), (answers_bm, page_hash_B, pair_B), (*asked_by_others, pair_of_answer))
    else:
        own = None
        rules = (
            (pair_B[rows, None], facts.owner_N, document_N),
            (answers_bm, facts.page_hash_N, document_N),
            (*asked_by_others, facts.positive_B[pair_of_answer]),
            (*same_query, facts.positive_B),
        )
    return Places(own, tuple((keys_bm, *_sorted(keys_c, column_c)) for keys_bm, keys_c, column_c in rules))


def own_hard_negatives(facts: BatchFacts, rows: slice) -> Places:
    """Each row's own hard negatives among the documents."""
    pair_B = torch.arange(len(facts.query_hash_B), device=facts.owner_N.device)
    document_N = torch.arange(len(facts.owner_N), device=pair_B.device)
    return Places(facts.positive_B[rows], ((pair_B[rows, None], *_sorted(facts.owner_N, document_N)),))


def _sorted(keys_c: Tensor, column_c: Tensor) -> tuple[Tensor, Tensor]:
    keys_c, order_c = keys_c.sort()
    return keys_c, column_c[order_c]


def _matches(keys_tm: Tensor, keys_c: Tensor, column_c: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) wherever one of a row's keys is a column's; the columns' keys are sorted."""
    keys_n = keys_tm.flatten()
    first_n = torch.searchsorted(keys_c, keys_n)
    count_n = torch.searchsorted(keys_c, keys_n, right=True) - first_n
    place = torch.repeat_interleave(count_n)  # of each match, which key it is of
    within = torch.arange(len(place), device=place.device) - (count_n.cumsum(0) - count_n)[place]
    return place // keys_tm.shape[1], column_c[first_n[place] + within]
