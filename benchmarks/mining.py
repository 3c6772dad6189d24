"""What an exact search costs over the bare matrix product of the same tiles, and whether it finds everything.

    python benchmarks/mining.py                              10,000 queries, 100,000 pages, about two minutes
    python benchmarks/mining.py --queries 2000 --rounds 3    smaller, for a look

`vs_matmul` is the time of `farnear.retrieve.search.top_k`, k = 100, over that of the product alone: the same blocks of
normalised fp32 embeddings, multiplied into the same buffer, and nothing done with the scores. Both are taken in turn,
and the figure is the ratio of their medians; other programs on the machine disturb the search more than the product,
for it has more and shorter parallel pieces, so `vs_matmul_least` is the ratio of the least times. `recall` is the share
of the pages of a full sort, of all scores at once, that are found, over some queries; a page counts as right where it
scores as the one in its place does, to rounding.

`peak_block_bytes` is the most that the process holds above the embeddings and its result while pages lie in a file that
is mapped, sampled from its anonymous memory; `most_block_bytes` is what the tile's size says: the scores, a block of
pages, the normalised queries and what is picked out of the scores. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from torch import Tensor

from farnear.retrieve.search import top_k

TILE = (256, 25600)


def tile_of(rows: int, largest: int) -> int:
    """Rows in a block as the search takes them: all alike, a multiple of 64, at most about ``largest``."""
    blocks = -(-rows // largest)
    return -(-rows // (blocks * 64)) * 64


def bare(unit_query_QD: Tensor, unit_page_PD: Tensor, score_qp: Tensor) -> None:
    """The product of all tiles; rows are whole tiles."""
    q, p = score_qp.shape
    for first_page in range(0, len(unit_page_PD), p):
        for first_query in range(0, len(unit_query_QD), q):
            block = unit_query_QD[first_query : first_query + q]
            torch.mm(block, unit_page_PD[first_page : first_page + p].T, out=score_qp)


def recall(query_QD: Tensor, page_PD: Tensor, scores_Qk: Tensor, pages_Qk: Tensor, queries: int) -> float:
    """Share of what a full sort finds."""
    unit_page_PD = torch.nn.functional.normalize(page_PD.double(), dim=1)
    found = 0
    for query in torch.linspace(0, len(query_QD) - 1, queries).long().tolist():
        score_P = unit_page_PD @ torch.nn.functional.normalize(query_QD[query].double(), dim=0)
        best_k = score_P.sort(descending=True).values[: pages_Qk.shape[1]]
        found += int((score_P[pages_Qk[query]] >= best_k - 1e-6).sum())
        assert len(set(pages_Qk[query].tolist())) == pages_Qk.shape[1]
        torch.testing.assert_close(scores_Qk[query].double(), score_P[pages_Qk[query]], rtol=0, atol=1e-5)
    return found / (queries * pages_Qk.shape[1])


class Peak:
    """The most private memory of this process while the block runs, above what it held before; in bytes."""

    def __enter__(self) -> "Peak":
        self._process, self._done = psutil.Process(), threading.Event()
        self.bytes, self._before = 0, self._held()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _held(self) -> int:
        # Pages of a mapped file are the system's to drop.
        memory = self._process.memory_info()
        return memory.rss - memory.shared

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, self._held() - self._before)


def main() -> None:
    """Measure, print a table, and last a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--pages", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    queries, pages, dim, k = options.queries, options.pages, options.dim, options.k
    generator = torch.Generator().manual_seed(0)
    query_QD, page_PD = (torch.randn(rows, dim, generator=generator) for rows in (queries, pages))
    q, p = tile_of(queries, TILE[0]), tile_of(pages, TILE[1])
    units = [
        torch.nn.functional.pad(torch.nn.functional.normalize(rows, dim=1), (0, 0, 0, -len(rows) % size))
        for rows, size in ((query_QD, q), (page_PD, p))
    ]
    score_qp = torch.empty(q, p)
    bare(*units, score_qp)
    top_k(query_QD, page_PD, k, tile=TILE)
    seconds: dict[str, list[float]] = {"matmul": [], "search": []}
    for _ in range(options.rounds):
        started = perf_counter()
        bare(*units, score_qp)
        seconds["matmul"].append(perf_counter() - started)
        started = perf_counter()
        scores_Qk, pages_Qk = top_k(query_QD, page_PD, k, tile=TILE)
        seconds["search"].append(perf_counter() - started)
        print(f"matmul {seconds['matmul'][-1]:6.2f} s   search {seconds['search'][-1]:6.2f} s", flush=True)
    share = recall(query_QD, page_PD, scores_Qk, pages_Qk, queries=200)
    result_bytes = scores_Qk.nbytes + pages_Qk.nbytes
    del units, score_qp, scores_Qk, pages_Qk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pages.npy")
        np.save(path, page_PD.numpy())
        del page_PD
        with Peak() as peak:
            top_k(query_QD, np.load(path, mmap_mode="r"), k, tile=TILE)
    # Keys while they are searched and unpacked take as much as the result again; picked out is half a tile at most,
    # with its places (16 bytes each) and keys, but no more than a few percent of it in the blocks after the first.
    most = 4 * q * p + 3 * 4 * p * dim + 2 * 4 * queries * dim + 10 * q * p
    median = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {
        "vs_matmul": round(median["search"] / median["matmul"], 3),
        "vs_matmul_least": round(min(seconds["search"]) / min(seconds["matmul"]), 3),
        "recall": share,
        "peak_block_bytes": peak.bytes - 2 * result_bytes,
        "most_block_bytes": most,
        "score_matrix_bytes": 4 * queries * pages,
        "queries": queries,
        "pages": pages,
        "dim": dim,
        "k": k,
        "tile": [q, p],
        "threads": torch.get_num_threads(),
        "seconds_matmul": round(median["matmul"], 3),
        "seconds_search": round(median["search"], 3),
    }
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
