"""`summary.json`: a finished run in a few figures, taken from what it has written on the way."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from farnear.config import RunConfig
from farnear.data.index import Index
from farnear.data.losses import losses_of
from farnear.files import replace_text
from farnear.run_folder import RunFolder
from farnear.training.metrics import mean_loss


def write_summary(
    config: RunConfig,
    folder: RunFolder,
    world_size: int,
    seconds: float,
    index: Index,
    *,
    exported_step: int,
    base_commits: Mapping[str, str],
) -> dict[str, Any]:
    """Write and return the summary.

    Args:
        index: Of the training shards, for what of them could not be used.
        exported_step: That the weights in `export/` are of.
        base_commits: Of base models on the hub, by the key that names each.
        seconds: From the start of this process group's work to now, evaluations and export included.
    """
    steps = _lines(folder.metrics)
    evaluations = _lines(folder.evaluations)
    losses = losses_of(index)
    summary: dict[str, Any] = {
        "strategy": config.strategy,
        "world_size": world_size,
        "steps": steps[-1]["step"] if steps else 0,
        "loss": mean_loss(steps[-config.training.logging_steps :]),
        "seconds": round(seconds, 1),
        "pairs_per_s": round(median(step["pairs_per_s"] for step in steps), 2) if steps else None,
        **({"skipped": steps[-1]["skipped"]} if steps and "skipped" in steps[-1] else {}),
        "left_out": sum(step["left_out"] is not None for step in steps),
        "rollbacks": sum("rolled_back_to" in step for step in steps),
        "masked": sum(step["masked"] for step in steps),
        "lost_to_faults": losses.known,
        "presumed_lost": losses.presumed,
        "excluded": index.excluded,
        "ignored_members": index.ignored_members,
        "quarantined": len({(pair["shard"], pair["key"]) for pair in _lines(folder.quarantine)}),
        "base_commits": dict(base_commits),
        "export": str(folder.export),
        "exported_step": exported_step,
    }
    for kind in ("before", "after"):
        of_kind = [evaluation for evaluation in evaluations if evaluation["kind"] == kind]
        if of_kind:
            by_dim = {dim: round(figures["ndcg@10"], 4) for dim, figures in of_kind[-1]["metrics"].items()}
            summary[f"ndcg@10_{kind}"] = by_dim[max(by_dim, key=int)]
            summary["ndcg@10_by_dim" if kind == "after" else "ndcg@10_by_dim_before"] = by_dim
    replace_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    return summary


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
