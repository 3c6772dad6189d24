"""Run folders made on the spot, without a training, for the tests of the report."""

import json
from pathlib import Path
from typing import Any


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 5.0 - 0.1 * step,
        "lr": 2e-5,
        "grad_norm": 1.5,
        "pairs_per_s": 80.0,
        "masked": step % 2,
        "tokens": 9000,
        "peak_memory_bytes": 2 * 2**30,
        "seconds": {"data": 0.1, "pass_one": 0.3, "loss": 0.1, "pass_two": 0.4, "optimizer": 0.1},
        **changes,
    }


def evaluation_line(step: int, kind: str, ndcg_by_dim: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    metrics = {dim: {"ndcg@1": 0.1, "ndcg@10": ndcg, "recall@10": 0.5} for dim, ndcg in ndcg_by_dim.items()}
    return {"step": step, "kind": kind, "queries": 200, "pages": 3000, "metrics": metrics, **changes}


def write_run(
    folder: Path,
    steps: list[dict[str, Any]] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
    config: str = "model:\n  name: tiny\n",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(config)
    for name, records in (("metrics.jsonl", steps), ("eval.jsonl", evaluations)):
        if records is not None:
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_rankings(
    folder: Path, kind: str, ranks: list[int | None], /, *, fingerprint: str = "f", asked: str = "query", **card: Any
) -> None:
    """A gallery's files of an evaluation with as many queries as ranks, all shown; page i answers query i.

    At the rank of a query stands its page, at the others those that follow; ``card`` is what stands for every page.
    """
    count = len(ranks)
    head = {"kind": kind, "step": 0, "fingerprint": fingerprint, "queries": count, "pages": count, "looked_at": 1000}
    lines = []
    for query, rank in enumerate(ranks):
        pages = [(query + 1 + place) % count for place in range(count - 1)]
        pages = pages if rank is None else [*pages[: rank - 1], query, *pages[rank - 1 :]]
        hits = [rank] if rank is not None and rank <= 10 else []
        scores = [1 - place / 10 for place in range(len(pages[:10]))]
        lines.append({"key": f"a.tar/k{query}", "query": f"{asked} {query}", "rank": rank, "hits": hits})
        lines[-1] |= {"pages": pages[:10], "scores": scores}
    shown = [{"line": query, "why": ["random sample"], "right": query, "kind": "text"} for query in range(count)]
    cards = {str(page): {"kind": "image", "name": f"a.tar/k{page}.png", **card} for page in range(count)}
    gallery = folder / "gallery"
    gallery.mkdir(exist_ok=True)
    (gallery / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    (gallery / f"{kind}-shown.json").write_text(json.dumps({"queries": shown, "pages": cards}))
