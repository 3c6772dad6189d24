"""Runs the stages of a flywheel file one after the other, each as its own command would.

    embedder -> what it mistakes for answers -> reranker -> its judgement -> a better embedder -> ...

The same command goes on where a killed one stopped: a stage that is done is passed over, one that was begun continues
from its newest whole checkpoint, or from what it has mined. Both hold only for what is made of what the file says now:
the stage's own keys, the shards' content, and the same of the stages that it needs. That is noted before a stage
begins. Where one was made of anything else nothing is thrown away, and nothing is mixed: before any stage runs, the
launch names the first such one and what has changed, and stops.

    OUTPUT/NAME.yaml        the run file of each stage, complete, from the beginning on
    OUTPUT/NAME/            its run folder, or what farnear mine leaves
    OUTPUT/stages.json      which are begun and done, what of, and what came of them
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic
from typing import Any

import yaml

from farnear.config import RunConfig
from farnear.errors import RunInterruptedError, UserError
from farnear.files import replace_text
from farnear.flywheel_file import Flywheel, Stage, read_flywheel
from farnear.launching.local import launch
from farnear.launching.mining import deciding, is_done, mine
from farnear.launching.run_data import fingerprints
from farnear.run_folder import RunFolder, claimed, published_checkpoints
from farnear.status import read_status

# How a stage is computed, and not what comes of it, or no more of it than rounding.
_HOW = (
    "output_dir",
    "strategy",
    "shard_within",
    "num_processes",
    "slurm*",
    "card*",
    "data.cache_dir",
    "data.remote*",
    "data.dataloader_*",
    "training.mini_batch_*",
    "training.no_grad_mini_batch_factor",
    "training.keep_graphs",
    "training.frozen_cache_gb",
    "training.reduce",
    "training.reshard",
    "training.gradient_checkpointing",
    "training.logging_steps",
    "training.save_*",
    "training.keep_every_n_steps",
    "training.async_save",
    "training.verify_checkpoints",
    "training.ddp_timeout",
    "training.report_to",
    "evaluation.per_device_eval_batch_size",
)


def launch_flywheel(
    file: Path,
    overrides: Sequence[str],
    *,
    num_processes: int | None = None,
    log_dir: Path | None = None,
) -> int:
    """Run every stage that is not done. Returns the exit code: that of the first stage which did not end with 0.

    Args:
        overrides: As `read_flywheel` takes them.
        num_processes: Ranks of every stage; wins over the file's.
        log_dir: Where each rank of each training is to have a log of its own, in a folder of the stage's name.

    Raises:
        UserError: The file is wrong, a stage was made of something else, or what a stage's own launch raises.
        RunInterruptedError: After a signal, as `launch` raises it.
    """
    if num_processes is not None:
        overrides = [*overrides, f"num_processes={num_processes}"]
    flywheel = read_flywheel(file, overrides)
    flywheel.folder.mkdir(parents=True, exist_ok=True)
    with claimed(RunFolder(flywheel.folder)):
        entries = _read(flywheel)
        made_of = _made_of(flywheel)
        _refuse_others(flywheel, made_of, entries)
        for stage in flywheel.stages:
            replace_text(stage.run_file, yaml.safe_dump(dict(stage.tree), sort_keys=False, allow_unicode=True))
        for number, stage in enumerate(flywheel.stages, 1):
            head = f"stage {number} of {len(flywheel.stages)}: {stage.name} ({stage.does})"
            if _is_done(stage, entries.get(stage.name)):
                print(f"{head}: done", flush=True)
                continue
            print(f"\n{head}", flush=True)
            _write(flywheel, stage.name, {"made_of": made_of[stage.name]})
            started = monotonic()
            try:
                code = _run(stage, log_dir)
            except RunInterruptedError:
                print(f"{head}: stopped; the same command goes on with it", flush=True)
                raise
            if code != 0:
                print(f"{head}: ended with {code}; the same command goes on with it", flush=True)
                return code
            result = {"does": stage.does, **_result(stage), "seconds": round(monotonic() - started, 1)}
            _write(flywheel, stage.name, {"made_of": made_of[stage.name], "result": result})
        print(f"\n{summary(flywheel)}", flush=True)
    return 0


def results(flywheel: Flywheel) -> dict[str, dict[str, Any]]:
    """What came of the stages that are done, by name; ``seconds`` are those since a stage was last begun."""
    return {name: entry["result"] for name, entry in _read(flywheel).items() if "result" in entry}


def summary(flywheel: Flywheel) -> str:
    """A table of what came of the stages."""
    lines = []
    for stage in flywheel.stages:
        result = results(flywheel)[stage.name]
        if stage.does == "mine":
            told = f"{result['negatives']:,} negatives of {result['pairs']:,} pairs"
        elif "ndcg@10" not in result:
            told = "not evaluated"
        else:
            told = f"nDCG@10 {result['ndcg@10']:.4f}"
            if "ndcg@10_embedder" in result:
                told += f", the same pages by the embedder {result['ndcg@10_embedder']:.4f}"
        lines.append(f"{stage.name:>{max(len(one.name) for one in flywheel.stages)}}  {told}")
    return "\n".join(lines)


def _run(stage: Stage, log_dir: Path | None) -> int:
    if stage.does == "mine":
        return mine(stage.run_file, [], model=None, out=stage.folder, num_processes=None)
    return launch(stage.run_file, [], resume="auto", log_dir=log_dir / stage.name if log_dir else None)


def _made_of(flywheel: Flywheel) -> dict[str, dict[str, Any]]:
    """What decides the results of each stage."""
    made_of: dict[str, dict[str, Any]] = {}
    exports = {str(stage.folder / "export") for stage in flywheel.stages}
    for stage in flywheel.stages:
        if stage.does == "mine":
            keys = deciding(stage.config)
            # Of models of the flywheel itself the stages say more.
            for key in ("model.name_or_path", "mining.reranker"):
                if keys[key] in exports:
                    del keys[f"files of {key}"]
        else:
            keys = dict(_deciding(stage.config)) | fingerprints(stage.config)
        of_needed = {f"stage {name}": _digest(made_of[name]) for name in stage.needs}
        made_of[stage.name] = {**keys, **of_needed}
    return made_of


def _deciding(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a training, as JSON holds them."""
    for section, value in config.model_dump(mode="json").items():
        keys = {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
        yield from ((key, one) for key, one in keys.items() if not any(fnmatch(key, how) for how in _HOW))


def _refuse_others(flywheel: Flywheel, made_of: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Raise UserError where stages have left something, and that was made of anything else."""
    changed: dict[str, list[str]] = {}
    for stage in flywheel.stages:
        if stage.name in entries and _has_left(stage):
            now, then = made_of[stage.name], entries[stage.name]["made_of"]
            if of_stage := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
                changed[stage.name] = of_stage
    if changed:
        first, *others = changed
        follow = f", and what {', '.join(others)} left follows from it" if others else ""
        raise UserError(
            f"stage {first} was made with another {', '.join(changed[first])}{follow}; restore what it was, or move "
            f"{', '.join(changed)} out of {flywheel.folder} to have {'them' if others else 'it'} made anew"
        )


def _has_left(stage: Stage) -> bool:
    """Whether there is anything of it to continue from, or to lose."""
    if stage.does == "mine":
        return (stage.folder / "negatives.jsonl").exists()
    return bool(published_checkpoints(RunFolder(stage.folder).checkpoints)) or (stage.folder / "export").is_dir()


def _is_done(stage: Stage, entry: Mapping[str, Any] | None) -> bool:
    """Whether it has ended and its results are there."""
    if entry is None or "result" not in entry:
        return False
    if stage.does == "mine":
        return is_done(stage.folder)
    status = read_status(RunFolder(stage.folder)) or {}
    return status.get("state") == "finished" and (stage.folder / "export").is_dir()


def _result(stage: Stage) -> dict[str, Any]:
    if stage.does == "mine":
        report = json.loads((stage.folder / "report.json").read_text(encoding="utf-8"))
        return {name: report[name] for name in ("pairs", "negatives")}
    lines = RunFolder(stage.folder).evaluations
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    after = next((record for record in reversed(records) if record["kind"] == "after"), None)
    if after is None:
        return {}
    full = max(after["metrics"], key=int)
    embedder = after.get("embedder")
    return {
        "ndcg@10": after["metrics"][full]["ndcg@10"],
        **({"ndcg@10_embedder": embedder["ndcg@10"]} if embedder else {}),
        **({"seconds_per_query": after["seconds_per_query"]} if "seconds_per_query" in after else {}),
    }


def _read(flywheel: Flywheel) -> dict[str, Any]:
    path = flywheel.folder / "stages.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["made_of"], dict) for entry in found.values()):
            raise ValueError("an entry is none")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so nobody knows which stages are done; remove it to have what is begun "
            "continued as it is"
        ) from None
    return {stage.name: found[stage.name] for stage in flywheel.stages if stage.name in found}


def _write(flywheel: Flywheel, name: str, entry: Mapping[str, Any]) -> None:
    replace_text(flywheel.folder / "stages.json", json.dumps({**_read(flywheel), name: entry}, indent=1) + "\n")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
