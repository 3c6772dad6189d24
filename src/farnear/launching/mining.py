"""Starts `farnear mine` on its ranks, as a training is started, or says that it is done already.

The same command goes on where a killed one stopped, and does nothing where one has ended with the same inputs: the run
file's sections that decide what is found, the shards by their content, and the model by the files of its folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farnear.config import RunConfig, load_config
from farnear.errors import UserError
from farnear.launching.local import run_beside
from farnear.launching.run_data import fingerprints
from farnear.run_folder import digest_of, done_in, files_left

PROGRAM = "mine.py"


def mine(
    run_file: Path, overrides: Sequence[str], *, model: str | None, out: Path | None, num_processes: int | None
) -> int:
    """Mine hard negatives for the training pairs of a run file. Returns the exit code.

    Args:
        model: In place of the run file's.
        out: The folder, in place of `mined` in the run folder.

    Raises:
        UserError: Before the start, or the one that a rank met.
    """
    words = [*overrides]
    if model is None and load_config(run_file, words).reranker is not None:
        raise UserError(
            f"{run_file} trains a reranker, and what mines is an embedder; name one with --model, or its run file"
        )
    if model is not None:
        words += [f"model.name_or_path={json.dumps(model)}", "model.revision=null", "model.router=null"]
    if num_processes is not None:
        words.append(f"num_processes={num_processes}")
    config = load_config(run_file, words)
    folder = out or Path(config.output_dir) / "mined"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and the negatives need a folder; name another one with --out")
    inputs = inputs_of(config)
    if is_done(folder, inputs):
        print(f"{folder / 'negatives.jsonl'} was mined of the same model, shards and settings; nothing is left to do")
        return 0
    return run_beside(PROGRAM, config, [str(folder), inputs, str(run_file), *words], folder)


def inputs_of(config: RunConfig) -> str:
    """A digest of what decides which negatives are found."""
    return digest_of(deciding(config))


def deciding(config: RunConfig) -> dict[str, Any]:
    """The same by what a person calls it: keys of the run file, and content and files that they name."""
    without_eval = config.data.model_copy(update={"eval": (), "eval_corpus": ()})
    models = {
        **{key: one.name_or_path for key, one in config.model.by_key.items()},
        "mining.reranker": config.mining.reranker,
    }
    return {
        **{f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()},
        **{
            f"mining.{key}": value
            for key, value in config.mining.model_dump(mode="json", exclude={"refresh_every"}).items()
        },
        **{f"training.{key}": getattr(config.training, key) for key in ("bf16", "fp16", "pure_bf16")},
        "data.max_bad_fraction": config.data.max_bad_fraction,
        "seed": config.seed,
        **fingerprints(config.model_copy(update={"data": without_eval})),
        **{f"files of {key}": files_of_model(Path(name)) for key, name in models.items() if name is not None},
    }


def files_of_model(model: Path) -> list[list[str | int]]:
    """Name, size and time of a folder's files; none of a model on the hub. Its card decides nothing."""
    found = model.rglob("*") if model.is_dir() else ()
    files = sorted(path for path in found if path.is_file() and path.name != "README.md")
    return [[str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def is_done(folder: Path, inputs: str | None = None) -> bool:
    """Whether a mining has ended there, of these inputs if they are given, and all that it has left is there still."""
    return done_in(folder, files_left, **({} if inputs is None else {"inputs": inputs}))
