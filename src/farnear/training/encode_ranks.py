"""What `farnear encode` has its ranks do: embed all queries and pages of some shards, and make a collection of them.

Parts are embedded into `parts` in the folder, where a killed encoding is gone on with; when all are there, rank 0 cuts
them to the dimension and precision that were asked for, and they go. The model runs as `farnear mine` has it run.
"""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from farnear.config import RunConfig, dump_config
from farnear.data.index import Index
from farnear.data.shard_store import ShardStore
from farnear.files import replace_text
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.alone import seconds_alone
from farnear.retrieve.codes import Precision
from farnear.retrieve.collection import refuse_dim
from farnear.retrieve.collection_writing import write_collection
from farnear.retrieve.embeddings import distinct_inputs, encode_all
from farnear.retrieve.encode import encode
from farnear.retrieve.inference import Inference, nothing
from farnear.run_folder import digest_of, done_in, files_of_collection
from farnear.signals import Signals
from farnear.training.beside_runs import Work, no_longer_done, note_done, work_in
from farnear.training.embedders import EmbedderKind, embedder_facts
from farnear.training.engine import build_model
from farnear.training.mine_ranks import mining_config
from farnear.training.opening import prepare_workers
from farnear.training.shards import kinds_of, open_to_encode, refuse_unsupported
from farnear.wording import counted

PARTS = "parts"
RUN_FILE = "encode.yaml"
"""How the embeddings of a folder were made, as a run file has it."""


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
    with work_in(config, folder, signals) as work:
        _encode(config, work, folder, encoding)


def _encode(config: RunConfig, work: Work, folder: Path, encoding: Encoding) -> None:
    world, between, watch = work.world, work.between, work.watch
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
    form = [encoding.truncate_dim, encoding.precision, encoding.about]
    content = digest_of({**facts, "index": index.fingerprint, "form": form})
    made_of = {"inputs": encoding.inputs, "content": content}

    def is_there() -> bool:
        # A launch goes by names, sizes and times of files; what counts is what is in them.
        if not done_in(folder, files_of_collection, content=content):
            return False
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        note_done(folder, files_of_collection(folder), **made_of)
        print(f"{folder} holds the embeddings by the same weights, of the same shards", flush=True)
        return True

    if on_main_rank(world, is_there):
        return
    work.terminal.begin()
    by = built.inference(config, world, between=between, told=watch.counts("encoding"))
    embeddings = encode_all(by, index, store, folder / PARTS, facts)
    about = {**facts, **encoding.about, **_seconds_alone(by, index, store), "device": _device(world)}

    def finish() -> None:
        no_longer_done(folder)
        write_collection(
            folder, embeddings, index, store, about, dim=encoding.truncate_dim, precision=encoding.precision
        )
        replace_text(folder / RUN_FILE, dump_config(config))
        shutil.rmtree(folder / PARTS)
        note_done(folder, files_of_collection(folder), **made_of)
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
            if len(rows):
                once = partial(_embed_alone, alone, index, store, side, rows)
                found[f"seconds_per_{side}"] = round(seconds_alone(once, len(rows)), 6)
    finally:
        by.model.train(True)
    return found


def _embed_alone(
    by: Inference, index: Index, store: ShardStore, side: str, rows: npt.NDArray[np.int64], place: int
) -> None:
    encode(by, index, store, side, rows[[place]])


def _device(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
