"""Seconds of `farnear compare` on two models from stored embeddings: 2,000 queries, 5,000 pages, seven dimensions.

    python benchmarks/compare.py [--rounds 3] [--precision float32 int8 binary]

The whole command is timed, from its start to its last line: imports, searches at every dimension, the bootstrap, the
files. The embeddings are random, so that the models differ as two trained ones may: each query lies near its page.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

QUERIES, PAGES, DIM = 2000, 5000, 2048
MATRYOSHKA_DIMS = (2048, 1536, 1024, 512, 256, 128, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["float32"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder) / name for name in ("base", "tuned")]
        for seed, (model, noise) in enumerate(zip(models, (4.0, 3.0), strict=True)):
            make_collection(model, seed, noise)
        command = [sys.executable, "-m", "farnear", "compare", *map(str, models), "--out", f"{folder}/out"]
        command += ["--precision", *arguments.precision]
        seconds = []
        for _ in range(arguments.rounds):
            started = perf_counter()
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
            seconds.append(perf_counter() - started)
    print(told)
    print(f"{arguments.rounds} rounds: {', '.join(f'{one:.2f}' for one in seconds)} s")
    print(json.dumps({"compare_seconds": round(median(seconds), 2), "precision": arguments.precision}))


def make_collection(folder: Path, seed: int, noise: float) -> None:
    """Pages at random, and each query near its page."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    page_PD = random.standard_normal((PAGES, DIM)).astype(np.float32)
    query_QD = page_PD[:QUERIES] + noise * random.standard_normal((QUERIES, DIM)).astype(np.float32)
    for name, rows in (("documents", page_PD), ("queries", query_QD)):
        np.save(folder / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    (folder / "document-ids.txt").write_text("".join(f"page-{page}\n" for page in range(PAGES)))
    (folder / "query-ids.txt").write_text("".join(f"query-{query}\n" for query in range(QUERIES)))
    (folder / "qrels.txt").write_text("".join(f"query-{query} 0 page-{query} 1\n" for query in range(QUERIES)))
    (folder / "manifest.json").write_text(json.dumps({"matryoshka_dims": MATRYOSHKA_DIMS}))


if __name__ == "__main__":
    main()
