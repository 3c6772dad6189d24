"""The shards of a run, indexed: rank 0 scans them, every rank maps what it found.

The index lies in the run folder, so that worker processes and ranks share one copy in memory.
"""

from dataclasses import dataclass
from pathlib import Path

from farnear.config import DataConfig, EvaluationConfig
from farnear.data.index import Index, build_index, expand_shards, open_index, write_index
from farnear.errors import UserError
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.evaluate import RetrievalTask, build_task, sample_task


@dataclass(frozen=True)
class RunData:
    """The pairs that are trained on, and the evaluation, whole and sampled, where the run file names shards for it."""

    train: Index
    whole: RetrievalTask | None
    sample: RetrievalTask | None


def open_data(data: DataConfig, evaluation: EvaluationConfig, folder: Path, world: World) -> RunData:
    """Scan the shards that the run file names and open their indexes. A collective.

    Raises:
        UserError: A shard is missing, damaged or empty, or stands on both sides.
    """
    on_main_rank(world, lambda: _write_indexes(data, folder))
    index = {path.stem: open_index(path) for path in sorted(folder.glob("*.arrow"))}
    if "eval" not in index:
        return RunData(index["train"], None, None)
    whole = build_task(index["eval"], index.get("corpus"))
    return RunData(index["train"], whole, sample_task(whole, evaluation.sample_queries, evaluation.sample_pages))


def _write_indexes(data: DataConfig, folder: Path) -> None:
    shards = {"train": expand_shards(data.train, "data.train")}
    if data.eval:
        shards["eval"] = expand_shards(data.eval, "data.eval")
        shared = sorted({path.resolve() for path in shards["train"]} & {path.resolve() for path in shards["eval"]})
        if shared:
            raise UserError(
                f"shard {shared[0]} is in data.train and in data.eval, so the evaluation would measure what was "
                "trained; name it on one side"
            )
    if data.eval_corpus:
        shards["corpus"] = expand_shards(data.eval_corpus, "data.eval_corpus")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.arrow"):
        leftover.unlink()
    for name, paths in shards.items():
        write_index(build_index(paths, pairs=name != "corpus"), folder / f"{name}.arrow")
