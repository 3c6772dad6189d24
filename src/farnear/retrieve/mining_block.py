"""A block of pairs: the documents nearest to each query, and which of them are kept as its negatives.

A document that answers the query is never among its negatives, whichever pair says that it does, and by whatever name
it goes: documents are searched by their content, each once. The filters and their names are those of
sentence-transformers' ``mine_hard_negatives``; the positive that they compare with is the pair's least similar one. A
reranker scores no more documents than it takes to keep enough: it is asked in turns, for those that are still missing.

Shapes: n pairs of a block, k documents nearest to each, m negatives kept, P distinct documents, q distinct queries.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.columns import ArrowStrings
from farnear.data.document_names import DocumentNames, shard_names
from farnear.data.index import Index
from farnear.data.negatives import AnswersOfQueries
from farnear.data.negatives_file import write_line
from farnear.data.plan import random_bits
from farnear.data.ranges import ranges
from farnear.files import published
from farnear.mining_section import MiningConfig
from farnear.parallel.collectives import agree_on_max
from farnear.parallel.world import World
from farnear.retrieve.embeddings import Embeddings
from farnear.retrieve.search import Search, faiss_search, top_k

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

ScorePairs = Callable[[Int64, Int64], Float32]
"""(input rows of queries, input rows of documents) -> a reranker's raw scores. Called equally often on every rank, with
nothing to score where a rank has nothing, so it may be a collective."""

_MOST_ANSWERS = 1024
"""Answers of a query, and documents that cannot be used, that its ranking is made longer by; a query of more, which
names no page, gets fewer negatives."""
_TILE = (256, 25600)
BINS = np.linspace(-1, 1, 2001)
"""Of the histograms of similarities."""
FILTERS = ("rank_window", "max_score", "min_score", "absolute_margin", "relative_margin", "reranker_margin")


class BlockMiner:
    """Ranks and filters a block of pairs."""

    def __init__(
        self,
        index: Index,
        embeddings: Embeddings,
        mining: MiningConfig,
        seed: int,
        world: World,
        score_pairs: ScorePairs | None,
        moved: Callable[[], None],
        unusable: Mapping[str, Int64] | None = None,
    ) -> None:
        """``unusable``: the places of embeddings, of each side, that stand for no input."""
        self._index, self._embeddings, self._mining, self._seed = index, embeddings, mining, seed
        self._world, self._score_pairs, self._moved = world, score_pairs, moved
        self._answers = AnswersOfQueries(index)
        self._answers_N = self._answers.counts()
        self._names = DocumentNames(index)
        self._shard_names = shard_names(index)
        documents = index.documents()
        # The first row of each content; the rows of a corpus come with a key, which reads best, where there is one.
        documents = documents[np.argsort(~np.isin(documents, index.corpus_C), kind="stable")]
        _, first_P = np.unique(index.input_hash_I[documents], return_index=True)
        self._row_P = documents[first_P]
        none = np.zeros(0, np.int64)
        self._unusable = {"query": none, "document": none} if unusable is None else unusable
        self._unusable_P = np.zeros(len(self._row_P), np.bool_)
        self._unusable_P[self._unusable["document"]] = True
        self._search: Search = self._exact
        if mining.use_faiss:
            self._search = faiss_search(embeddings.documents)

    def _exact(self, query_QD: Float32, k: int) -> tuple[Tensor, Tensor]:
        queries = torch.from_numpy(query_QD).to(self._world.device)
        scores, pages = top_k(queries, self._embeddings.documents, k, tile=_TILE, moved=self._moved)
        return scores.cpu(), pages.cpu()

    def block(self, pairs: Int64, path: Path | None) -> dict[str, Any]:
        """Write the lines of some pairs and return what there is to count. A collective where there is a reranker."""
        mining, index = self._mining, self._index
        fell = dict.fromkeys(FILTERS, 0)
        page_nk, score_nk = self._nearest(pairs)
        positive = _Positives(index, self._embeddings, pairs)
        passes_nk, nth_nk = self._window(pairs, page_nk)
        limit_n = positive.least_n[:, None]
        tests: dict[str, Bool] = {}
        if mining.max_score is not None:
            tests["max_score"] = score_nk <= mining.max_score
        if mining.min_score is not None:
            tests["min_score"] = score_nk >= mining.min_score
        if mining.absolute_margin is not None:
            tests["absolute_margin"] = score_nk + mining.absolute_margin <= limit_n
        if mining.relative_margin is not None:
            tests["relative_margin"] = score_nk <= limit_n * (1 - mining.relative_margin)
        fell["rank_window"] = int(((nth_nk >= 0) & (nth_nk < mining.range_min)).sum())
        for name, is_in_nk in tests.items():
            fell[name] = int((passes_nk & ~is_in_nk).sum())
            passes_nk &= is_in_nk
        order_nk = self._order(pairs, passes_nk, nth_nk)
        teacher_nk, positive_teacher = self._judged(pairs, page_nk, passes_nk, order_nk, positive)
        if teacher_nk is not None and mining.reranker_margin is not None:
            least_n = positive.least(positive_teacher)
            vetoed_nk = passes_nk & (teacher_nk > least_n[:, None] - mining.reranker_margin)
            fell["reranker_margin"] = int(vetoed_nk.sum())
            passes_nk &= ~vetoed_nk
        kept_nm = np.take_along_axis(passes_nk, order_nk, axis=1)
        kept_nm &= kept_nm.cumsum(axis=1) <= mining.num_negatives
        count_n = kept_nm.sum(axis=1)
        places = order_nk[kept_nm]
        owner = np.repeat(np.arange(len(pairs)), count_n)
        rows = self._row_P[page_nk[owner, places]]
        columns = {"neg_similarity": score_nk[owner, places], "pos_similarity": positive.similarity}
        if teacher_nk is not None:
            columns |= {"neg_teacher": teacher_nk[owner, places], "pos_teacher": positive_teacher}
        if path is not None:
            self._write(path, pairs, count_n, self._names.names(rows), positive.start_n1, columns)
        return {
            "pairs": len(pairs),
            "negatives": int(count_n.sum()),
            "pairs_without": int((count_n == 0).sum()),
            "pairs_with_fewer": int((count_n < mining.num_negatives).sum()),
            "fell": fell,
            "negative_similarity": np.histogram(columns["neg_similarity"].clip(-1, 1), BINS)[0].tolist(),
            "positive_similarity": np.histogram(positive.similarity.clip(-1, 1), BINS)[0].tolist(),
        }

    def _nearest(self, pairs: Int64) -> tuple[Int64, Float32]:
        """The nearest documents of each pair's query, by their place among all, and their similarities."""
        if len(pairs) == 0:
            return np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32)
        hash_q, query_n = np.unique(self._index.query_hash_N[pairs], return_inverse=True)
        others = int(self._answers_N[pairs].max()) + len(self._unusable["document"])
        k = self._mining.range_max + min(others, _MOST_ANSWERS)
        score_qk, page_qk = self._search(self._embeddings.query(hash_q), min(k, len(self._row_P)))
        return page_qk.numpy()[query_n], score_qk.numpy()[query_n]

    def _window(self, pairs: Int64, page_nk: Int64) -> tuple[Bool, Int64]:
        """Which may be negatives and are in the window of ranks, and the rank of each among those that may be."""
        k = page_nk.shape[1]
        query_hash_n = np.repeat(self._index.query_hash_N[pairs], k)
        hash_n = self._embeddings.document_hash_P[page_nk.ravel()]
        is_none_nk = self._answers.of_hashes(query_hash_n, hash_n).reshape(page_nk.shape) | self._unusable_P[page_nk]
        unusable_hash = self._embeddings.query_hash_Q[self._unusable["query"]]
        is_none_nk |= np.isin(self._index.query_hash_N[pairs], unusable_hash)[:, None]
        nth_nk = np.where(is_none_nk, -1, (~is_none_nk).cumsum(axis=1) - 1)
        return (nth_nk >= self._mining.range_min) & (nth_nk < self._mining.range_max), nth_nk

    def _order(self, pairs: Int64, passes_nk: Bool, nth_nk: Int64) -> Int64:
        """The columns in the order in which they are taken, those that do not pass at the end."""
        key_nk = nth_nk.astype(np.uint64)
        if self._mining.sampling_strategy == "random":
            number_nk = pairs[:, None] * self._mining.range_max + nth_nk.clip(min=0)
            key_nk = random_bits(f"{self._seed}/mined", number_nk) >> np.uint64(1)
        key_nk = np.where(passes_nk, key_nk, np.uint64(1 << 63))
        return np.argsort(key_nk, axis=1, kind="stable").astype(np.int64, copy=False)

    def _judged(
        self, pairs: Int64, page_nk: Int64, passes_nk: Bool, order_nk: Int64, positive: "_Positives"
    ) -> tuple[Float32 | None, Float32]:
        """The reranker's scores of as many as it takes to keep enough, -inf for the rest, which are not taken then.

        Marks in ``passes_nk`` what was not looked at as not passing.
        """
        score_pairs, mining = self._score_pairs, self._mining
        if score_pairs is None:
            return None, positive.similarity
        query_row_n = self._index.query_N[pairs]
        teacher_nk = np.full(page_nk.shape, np.nan, np.float32)
        left_n = passes_nk.sum(axis=1)
        looked_n, found_n = np.zeros_like(left_n), np.zeros_like(left_n)
        # The positives come with the first turn.
        of_positive = np.repeat(np.arange(len(pairs)), np.diff(positive.start_n1))
        positive_teacher, bound_n = np.zeros(0, np.float32), np.zeros(len(pairs), np.float32)
        owner_p, row_p = of_positive, positive.rows
        while True:
            wanted_n = np.minimum(mining.num_negatives - found_n, left_n - looked_n).clip(min=0)
            if agree_on_max([len(row_p) + int(wanted_n.sum())], self._world.device)[0] == 0:
                break
            owner = np.repeat(np.arange(len(pairs)), wanted_n)
            column = order_nk[owner, ranges(looked_n, wanted_n)]
            rows = np.concatenate([row_p, self._row_P[page_nk[owner, column]]])
            scores = score_pairs(query_row_n[np.concatenate([owner_p, owner])], rows)
            if len(row_p):
                positive_teacher, scores = scores[: len(row_p)], scores[len(row_p) :]
                bound_n = np.full(len(pairs), np.inf, np.float32)
                if mining.reranker_margin is not None:
                    bound_n = positive.least(positive_teacher) - mining.reranker_margin
                    # A positive that cannot be used has no score, and nothing to compare with.
                    left_n[np.isnan(bound_n)] = 0
                owner_p, row_p = owner_p[:0], row_p[:0]
            teacher_nk[owner, column] = scores
            found_n += np.bincount(owner[scores <= bound_n[owner]], minlength=len(pairs))
            looked_n += wanted_n
        passes_nk &= ~np.isnan(teacher_nk)
        return teacher_nk, positive_teacher

    def _write(
        self,
        path: Path,
        pairs: Int64,
        count_n: Int64,
        names: ArrowStrings,
        positive_start_n1: Int64,
        columns: Mapping[str, Float32],
    ) -> None:
        ids, stop_n = names.column.to_pylist(), np.cumsum(count_n)
        with published(path) as file:
            for place, pair in enumerate(pairs.tolist()):
                own = slice(int(stop_n[place] - count_n[place]), int(stop_n[place]))
                of_positives = slice(int(positive_start_n1[place]), int(positive_start_n1[place + 1]))
                scores = {name: of[own if name[:3] == "neg" else of_positives] for name, of in columns.items()}
                shard = self._shard_names[self._index.pair_shard_N[pair]]
                write_line(file, shard, self._index.pair_key[pair], ids[own], scores)


class _Positives:
    """The positives of a block's pairs, end to end, and their similarities to the queries."""

    def __init__(self, index: Index, embeddings: Embeddings, pairs: Int64) -> None:
        size_n = np.diff(index.positive_start_N1)[pairs]
        self.start_n1 = np.append(0, np.cumsum(size_n))
        self.rows = index.positives[ranges(index.positive_start_N1[pairs], size_n)]
        owner = np.repeat(np.arange(len(pairs)), size_n)
        query_hash, query_of = np.unique(index.query_hash_N[pairs], return_inverse=True)
        query_QD, page_PD = (
            _unit(embeddings.query(query_hash)),
            _unit(embeddings.document(index.input_hash_I[self.rows])),
        )
        self.similarity: Float32 = np.einsum("nd,nd->n", query_QD[query_of[owner]], page_PD)
        self.least_n = self.least(self.similarity)

    def least(self, values: Float32) -> Float32:
        """The least of each pair's values."""
        return np.minimum.reduceat(values, self.start_n1[:-1]) if len(values) else values


def _unit(e_nD: Float32) -> Float32:
    return e_nD / np.linalg.norm(e_nD, axis=1, keepdims=True).clip(min=1e-12)
