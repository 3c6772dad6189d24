"""Mining again during a run: the hard negatives of an embedder that has moved on are not those of the one it was.

A refresh is due every `mining.refresh_every` steps, after what else follows the step: a checkpoint of that step is
saved before, and does not know of it. What is found lies in the run folder:

    mined/step-NNNNNNNN/negatives.jsonl, report.json, examples.html     as `farnear mine` leaves them
    mined/step-NNNNNNNN/embeddings/                                     while it is mined

What is found follows from the weights, so a run that is killed at any moment goes on to the same end: from a checkpoint
of the refresh's step or before, the refresh comes (again); a checkpoint after it knows the file that it was trained
with, by its hash, and a resume takes that one and no other.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from farnear.data.negatives import Negatives
from farnear.parallel.world import on_main_rank
from farnear.run_folder import RunFolder
from farnear.training.beside import mine_judged
from farnear.training.checkpoint import Progress, hash_of
from farnear.training.embedders import embedder_facts
from farnear.training.metrics import append_line
from farnear.training.mined import negatives_path, read_mined
from farnear.training.opening import Run
from farnear.wording import counted


def mine_again(run: Run, progress: Progress) -> tuple[Negatives, Progress]:
    """Mine with the weights as they are; the negatives, and the progress that knows of them. A collective.

    Raises:
        StopAskedError: On every rank, when a signal has come. What is embedded is kept.
        UserError: Too many inputs cannot be used, or the folder not be written.
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    config, world, step, started = run.config, run.world, progress.step, perf_counter()
    path = negatives_path(run.folder, step)

    run.watch.at("mining", step=step)
    with run.watch.patient():
        facts = {**embedder_facts(config, run.built, world), "step": step}
    by = run.built.inference(
        config,
        world,
        between=run.guard.stop_if_asked,
        moved=lambda: run.watch.at("mining: search", step=step),
        told=run.watch.counts("mining", step),
    )
    mined = mine_judged(config, run.data, by, path.parent, facts)
    run.watch.at("mining: read", step=step)
    with run.watch.patient():
        digest = on_main_rank(world, lambda: _settled(run.folder, path))
        negatives = read_mined(path, run.data.train, world)
    if world.is_main:
        _tell(run.folder, step, mined.report, perf_counter() - started)
    return negatives, replace(progress, mined_step=step, mined_hash=digest)


def _settled(folder: RunFolder, path: Path) -> str:
    """The hash of a file that is mined. What is of no more use, of this mining and those before, goes."""
    for leftover in (*folder.mined.glob("step-*/embeddings"), *folder.mined.glob("step-*/parts")):
        shutil.rmtree(leftover, ignore_errors=True)
    for columns in folder.mined.glob("step-*/negatives-*.arrow"):
        columns.unlink(missing_ok=True)
    return hash_of(path)


def _tell(folder: RunFolder, step: int, report: Mapping[str, Any], seconds: float) -> None:
    record = {name: report[name] for name in ("pairs", "negatives", "pairs_with_fewer")}
    append_line(folder.minings, {"step": step, **record, "seconds": round(seconds, 2), "phases": report["seconds"]})
    fewer = f", {counted(report['pairs_with_fewer'], 'pair')} with fewer" if report["pairs_with_fewer"] else ""
    if report["unusable"]:
        fewer += f", {counted(len(report['unusable']), 'input')} left out that cannot be used"
    print(
        f"step {step}: mined {counted(report['negatives'], 'hard negative')} of {counted(report['pairs'], 'pair')} "
        f"({report['num_negatives']} each{fewer}) in {seconds:.1f} s",
        flush=True,
    )
