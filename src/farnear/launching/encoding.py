"""Starts `farnear encode` on its ranks, as a training is started, or says that it is done already.

A model is named by its folder or its name on the hub, by the folder of a run, whose export is meant, by that export, or
by a checkpoint of a run (`RUN/best` too), of which an export is made first. Of a run its run file is known, and with it
how the model is to be computed and which Matryoshka dims it was trained to have; of any other what the command line
says.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farnear.config import RunConfig, apply_override, load_config, model_beside, parse_config
from farnear.data.index_cache import cache_folder, cached_index
from farnear.data.run_shards import shard_store, shards_to_encode
from farnear.errors import UserError
from farnear.launching.hardware import read_hardware
from farnear.launching.local import run_beside
from farnear.launching.mining import files_of_model
from farnear.model.hub import refuse_absent
from farnear.run_folder import RunFolder, checkpoint_named, digest_of, done_in, files_of_collection

PROGRAM = "encode.py"


@dataclass(frozen=True)
class NamedModel:
    """A model as the command line names it.

    Attributes:
        name_or_path: What is loaded; of a checkpoint, where its export is to be.
        run: The run that has trained it, if that is known.
        checkpoint: What is to be exported there.
    """

    name_or_path: str
    run: RunConfig | None = None
    checkpoint: Path | None = None

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        """Those that it was trained to have, as far as is known."""
        return () if self.run is None else self.run.loss.matryoshka_dims or ()


def named_model(word: str, exported: Path) -> NamedModel:
    """What a word of the command line means.

    Args:
        exported: Where the export of a checkpoint is to be.

    Raises:
        UserError: A run that has trained no embedder, or exported none yet.
    """
    path = checkpoint_named(Path(word))
    is_checkpoint = path.absolute().parent.name == "checkpoints"
    run_folder = path.absolute().parents[1] if is_checkpoint else path.parent if path.name == "export" else path
    if not path.is_dir() or not RunFolder(run_folder).config.is_file():
        return NamedModel(word)
    run = load_config(RunFolder(run_folder).config)
    if run.reranker is not None:
        raise UserError(f"{run_folder} has trained a reranker, which embeds nothing; name an embedder")
    if is_checkpoint:
        return NamedModel(str(exported), run, path)
    export = RunFolder(run_folder).export
    if not export.is_dir():
        raise UserError(
            f"{run_folder} has exported no model yet; name a checkpoint of it ({run_folder}/checkpoints/step-...), or "
            "wait for its first evaluation"
        )
    return NamedModel(str(export), run)


def encoding_config(
    model: NamedModel,
    shards: Sequence[str],
    corpus: Sequence[str],
    overrides: Sequence[str],
    folder: Path,
    beside: RunConfig | None = None,
) -> RunConfig:
    """A run file that names the model and what it is to embed, as its section `data` says.

    Args:
        overrides: `section.key=value` words; they win over what the model's own run says.
        beside: A run whose model it is measured beside. What no run of its own is known of is computed as that one is,
            and sees pages of the same size; that run's base model is what it was before the training.

    Raises:
        UserError: A key is unknown, or a value out of range.
    """
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"name_or_path": model.name_or_path},
        "data": {"train": list(shards), "train_corpus": list(corpus)},
        "strategy": "single",
    }
    run = model.run or beside
    if run is not None:
        if model.run is None and _same_model(model.name_or_path, run.model.name_or_path):
            tree["model"] = run.model.model_dump(mode="json", exclude={"lora", "freeze"})
        else:
            tree["model"] = model_beside(run, model.name_or_path).model_dump(mode="json")
            if model.run is None:
                tree["model"] |= {"min_pixels": run.model.min_pixels, "max_pixels": run.model.max_pixels}
        tree["training"] = {key: getattr(run.training, key) for key in ("bf16", "fp16", "pure_bf16")}
        if run.strategy in ("zero3", "fsdp2"):
            tree["strategy"] = run.strategy
        tree["data"] |= {"dataloader_num_workers": run.data.dataloader_num_workers, "cache_dir": run.data.cache_dir}
        tree["evaluation"] = {"per_device_eval_batch_size": run.evaluation.per_device_eval_batch_size}
    if tree["strategy"] == "single" and len(read_hardware().gpus) > 1:
        tree["strategy"] = "ddp"
    for override in overrides:
        apply_override(tree, override)
    if (tree.get("num_processes") or 1) > 1 and tree["strategy"] == "single":
        tree["strategy"] = "ddp"
    return parse_config(tree, source=f"encoding with {model.name_or_path}")


def _same_model(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def encode(
    config: RunConfig, folder: Path, *, truncate_dim: int | None, precision: str, about: Mapping[str, Any]
) -> int:
    """Embed what a run file's `data.train` names into a folder. Returns the exit code.

    Args:
        config: As `encoding_config` gives it.
        about: Goes into the manifest.

    Raises:
        UserError: Before the start, or the one that a rank met.
    """
    for model in config.model.by_key.values():
        refuse_absent(model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and embeddings need a folder; name another one")
    inputs = _inputs_of(config, truncate_dim, precision, about)
    if done_in(folder, files_of_collection, inputs=inputs):
        print(f"{folder} holds the embeddings of the same model and shards; nothing is left to do", flush=True)
        return 0
    others = [path for path in folder.iterdir() if path != Path(config.model.name_or_path)] if folder.exists() else []
    if others and not RunFolder(folder).lock.exists():
        raise UserError(f"{folder} holds other files, which are not replaced; name another folder")
    encoding = {"truncate_dim": truncate_dim, "precision": precision, "inputs": inputs, "about": dict(about)}
    # Nothing is written here: another launch may hold the folder, and its ranks would read it.
    return run_beside(PROGRAM, config, [str(folder), config.model_dump_json(), json.dumps(encoding)], folder)


def _inputs_of(config: RunConfig, truncate_dim: int | None, precision: str, about: Mapping[str, Any]) -> str:
    """A digest of what decides what the folder holds."""
    cache = cache_folder(config.data.cache_dir)
    store = shard_store(config.data, cache)
    return digest_of(
        {
            "model": config.model.model_dump(mode="json"),
            "files": files_of_model(Path(config.model.name_or_path)),
            "precision": [getattr(config.training, key) for key in ("bf16", "fp16", "pure_bf16")],
            "content": cached_index(shards_to_encode(config.data, store), cache, store).fingerprint,
            "form": [truncate_dim, precision, dict(about)],
        }
    )
