"""What `farnear encode` has its ranks do: embed all queries and pages of some shards, and make a collection of them.

Parts are embedded into `parts` in the folder, where a killed encoding is gone on with; when all are there, rank 0 cuts
them to the dimension and precision that were asked for, and they go. The model runs as `farnear mine` has it run.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from farnear.config import RunConfig
from farnear.data.index import Index
from farnear.data.shard_store import ShardStore
from farnear.errors import RunInterruptedError
from farnear.files import replace_text
from farnear.parallel.world import World, on_main_rank, start_world, stop_world
from farnear.retrieve.codes import Precision
from farnear.retrieve.collection import refuse_dim
from farnear.retrieve.collection_writing import write_collection
from farnear.retrieve.embeddings import distinct_inputs, encode_all
from farnear.retrieve.encode import encode
from farnear.retrieve.inference import Inference, nothing
from farnear.run_folder import DONE, RunFolder, claimed, files_of_collection
from farnear.signals import Signals
from farnear.training.embedders import EmbedderKind, embedder_facts
from farnear.training.engine import build_model
from farnear.training.guard import Guard, StopAskedError
from farnear.training.mine_ranks import mining_config
from farnear.training.opening import prepare_workers
from farnear.training.shards import kinds_of, open_to_encode, refuse_unsupported
from farnear.training.terminal import Terminal
from farnear.training.watch import Watch
from farnear.wording import counted

PARTS = "parts"
_ALONE = 9
"""Inputs that are timed one by one, after one that warms up."""


@dataclass(frozen=True)
class Encoding:
    """What is made of the embeddings.

    Attributes:
        truncate_dim: Components to keep; None for all.
        inputs: What a launch knows the same encoding by; noted in the folder when it is done.
        about: Goes into the manifest.
    """

    truncate_dim: int | None
    precision: Precision
    inputs: str
    about: dict[str, Any]


def encode_on_ranks(config: RunConfig, folder: Path, encoding: Encoding, signals: Signals | None = None) -> None:
    """Encode into a folder on the ranks that the launcher started.

    Args:
        config: Its `data.train` and `data.train_corpus` are what is encoded.

    Raises:
        UserError: Naming what is wrong with shards or model.
        RunInterruptedError: On every rank, after a signal.
    """
    config = mining_config(config)
    world = start_world(config)
    claim = ExitStack()
    try:
        on_main_rank(world, lambda: claim.enter_context(claimed(RunFolder(folder))))
        # It speaks of what was there before, which from now on is changed.
        on_main_rank(world, lambda: (folder / DONE).unlink(missing_ok=True))
        guard, watch = Guard(world, signals), Watch()
        with Terminal(watch, is_main=world.is_main) as terminal:
            _encode(config, world, folder, encoding, guard.stop_if_asked, watch, terminal)
    except StopAskedError as asked:
        raise RunInterruptedError(
            f"stopped by {asked}; what is embedded is kept, and the same command goes on"
        ) from None
    finally:
        claim.close()
        stop_world()


def _encode(
    config: RunConfig,
    world: World,
    folder: Path,
    encoding: Encoding,
    between: Callable[[], None],
    watch: Watch,
    terminal: Terminal,
) -> None:
    if config.data.dataloader_num_workers:
        prepare_workers()
    watch.at("shards")
    index, store = open_to_encode(config.data, world)
    between()
    watch.at("model")
    built = build_model(config, EmbedderKind(config), world)
    refuse_unsupported(built.model, config.model.name_or_path, kinds_of(index))
    facts = embedder_facts(config, built, world)
    refuse_dim(encoding.truncate_dim or facts["dim"], facts["dim"], encoding.precision)
    terminal.begin()
    by = built.inference(config, world, between=between, told=watch.counts("encoding"))
    embeddings = encode_all(by, index, store, folder / PARTS, facts)
    about = {**facts, **encoding.about, **_seconds_alone(by, index, store), "device": _device(world)}

    def finish() -> None:
        write_collection(
            folder, embeddings, index, store, about, dim=encoding.truncate_dim, precision=encoding.precision
        )
        shutil.rmtree(folder / PARTS)
        replace_text(
            folder / DONE,
            json.dumps({"inputs": encoding.inputs, "files": files_of_collection(folder)}, indent=1) + "\n",
        )
        queries, documents = len(embeddings.queries), len(embeddings.documents)
        asked = f" and {counted(queries, 'query', 'queries')}" if queries else ""
        print(f"encoded {counted(documents, 'page')}{asked} into {folder}", flush=True)

    on_main_rank(world, finish)


def _seconds_alone(by: Inference, index: Index, store: ShardStore) -> dict[str, float]:
    """What a query, and a page, takes that comes alone, read and prepared: the median of some. A collective."""
    alone = replace(by, num_workers=0, told=nothing)
    found = {}
    by.model.train(False)
    try:
        for side, (_, rows) in distinct_inputs(index).items():
            seconds = []
            for place in np.linspace(0, len(rows) - 1, 1 + _ALONE).astype(int).tolist() if len(rows) else ():
                started = perf_counter()
                encode(alone, index, store, side, rows[[place]])
                seconds.append(perf_counter() - started)
            if seconds:
                found[f"seconds_per_{side}"] = round(median(seconds[1:]), 6)
    finally:
        by.model.train(True)
    return found


def _device(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
