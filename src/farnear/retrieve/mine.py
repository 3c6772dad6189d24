"""Mine hard negatives: for every training pair the pages nearest to its query that do not answer it.

    embed every query and document -> exact nearest pages of each query -> filters -> a reranker's veto -> a file

Pairs are taken in blocks of the index's order, dealt to the ranks in rounds. What a block gives follows from the
embeddings and the settings alone, so the file is the same for every number of ranks, and each block's lines are kept
beside it until all are there: a run that was killed goes on with the blocks that are missing.

    FOLDER/embeddings/        farnear.retrieve.embeddings
    FOLDER/parts/             lines and counts of each block
    FOLDER/negatives.jsonl    what `data.negatives` names; see farnear.data.negatives_file
    FOLDER/report.json        how many were found and why others were not
    FOLDER/examples.html      some queries, their positives and their negatives

How a block is mined is in `farnear.retrieve.mining_block`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from farnear.data.index import Index
from farnear.data.negatives_file import write_header
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError
from farnear.files import published, remove_drafts, replace_text
from farnear.mining_section import MiningConfig
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.embeddings import SIDES, Embeddings, distinct_inputs, empty_rows, encode_all
from farnear.retrieve.inference import Inference
from farnear.retrieve.mining_block import BINS, FILTERS, BlockMiner, ScorePairs
from farnear.retrieve.mining_page import write_examples

Int64 = npt.NDArray[np.int64]

_MOST_PAIRS_OF_A_BLOCK, _FEWEST_PAIRS_OF_A_BLOCK, _BLOCKS = 8192, 64, 32
_COUNTS = ("pairs", "negatives", "pairs_with_fewer", "pairs_without")
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Mined:
    """What came of it.

    Attributes:
        path: Of the side file.
        report: As report.json has it.
    """

    path: Path
    report: Mapping[str, Any]


def mine(
    by: Inference,
    index: Index,
    store: ShardStore,
    mining: MiningConfig,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    seed: int,
    max_bad_fraction: float = 0.0,
    score_pairs: ScorePairs | None = None,
    reranker_facts: Mapping[str, Any] | None = None,
) -> Mined:
    """Mine negatives of all pairs of an index into a folder. A collective; leaves a strategy in training mode.

    Args:
        facts: What the embeddings are of: the model and a fingerprint of its weights above all.
        seed: Of sampling_strategy random.
        max_bad_fraction: Share of the queries, or of the documents, that may be left out because they cannot be used.
        score_pairs: The reranker of ``mining.reranker``, whose weights ``reranker_facts`` tell.

    Raises:
        UserError: The folder cannot be written, FAISS is asked for and not there, or too many inputs cannot be used.
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    world, seconds = by.world, {}
    started = perf_counter()
    embeddings = encode_all(by, index, store, folder / "embeddings", facts, needed=max_bad_fraction == 0)
    unusable = _unusable(embeddings, max_bad_fraction)
    seconds["encode"] = perf_counter() - started
    started = perf_counter()
    told = {**facts, "fingerprint": index.fingerprint, "mining": mining.model_dump(), "seed": seed}
    if reranker_facts is not None:
        told["reranker"] = dict(reranker_facts)
    blocks = _blocks(len(index))
    parts = folder / "parts"
    absent: list[int] = on_main_rank(world, lambda: _absent(parts, told, len(blocks)))
    miner = BlockMiner(index, embeddings, mining, seed, world, score_pairs, by.moved, unusable)
    for first in range(0, len(absent), world.world_size):
        by.turn("pairs searched for", len(index) * (first + len(blocks) - len(absent)) // len(blocks), len(index))
        of_round = absent[first : first + world.world_size]
        number = of_round[world.rank] if world.rank < len(of_round) else None
        pairs = blocks[number] if number is not None else blocks[0][:0]
        counts = miner.block(pairs, parts / f"{number:05d}.jsonl" if number is not None else None)
        if number is not None:
            # It says that the lines are there.
            replace_text(_counts_of(parts, number), json.dumps(counts) + "\n")
    on_main_rank(world, lambda: None)
    seconds["search"] = perf_counter() - started

    def finish() -> dict[str, Any]:
        started = perf_counter()
        path = folder / "negatives.jsonl"
        with published(path) as file:
            write_header(file, told)
            for number in range(len(blocks)):
                with open(parts / f"{number:05d}.jsonl", "rb") as part:
                    shutil.copyfileobj(part, file)
        counts = [json.loads(_counts_of(parts, n).read_text(encoding="utf-8")) for n in range(len(blocks))]
        report = _report(index, mining, counts)
        inputs = distinct_inputs(index)
        report["unusable"] = [index.input_id(int(row)) for side in SIDES for row in inputs[side][1][unusable[side]]]
        write_examples(index, store, path, folder / "examples.html", told)
        seconds["write"] = perf_counter() - started
        report["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
        replace_text(folder / "report.json", json.dumps({**report, **told}, indent=1) + "\n")
        shutil.rmtree(parts)
        return report

    return Mined(folder / "negatives.jsonl", on_main_rank(world, finish))


def weights_fingerprint(strategy: Strategy, world: World, frozen_hash: str) -> str:
    """Of all weights, the trained ones as they are now; what `mine` knows a model by. A collective.

    Args:
        frozen_hash: Of those that are not trained.
    """
    weights = strategy.full_weights()

    def digest() -> str:
        found = xxhash.xxh3_128(frozen_hash.encode())
        for name in sorted(weights):
            found.update(name.encode())
            found.update(weights[name].float().contiguous().numpy().data)
        return str(found.hexdigest())

    return on_main_rank(world, digest)


def _unusable(embeddings: Embeddings, max_bad_fraction: float) -> dict[str, Int64]:
    """The embeddings of each side that stand for no input; the same on every rank."""
    if max_bad_fraction == 0:
        return dict.fromkeys(SIDES, np.zeros(0, np.int64))
    found = {"query": empty_rows(embeddings.queries), "document": empty_rows(embeddings.documents)}
    for side, total in (("query", len(embeddings.queries)), ("document", len(embeddings.documents))):
        if (bad := len(found[side])) > max_bad_fraction * total:
            raise UserError(
                f"{bad} of {total} {SIDES[side]} cannot be read or prepared for the model, above data.max_bad_fraction "
                f"({max_bad_fraction:g}), so too little would be mined of; mend the shards, or raise it"
            )
    return found


def _blocks(pairs: int) -> list[Int64]:
    size = min(_MOST_PAIRS_OF_A_BLOCK, max(_FEWEST_PAIRS_OF_A_BLOCK, -(-pairs // _BLOCKS)))
    return [np.arange(first, min(first + size, pairs)) for first in range(0, pairs, size)]


def _absent(parts: Path, told: Mapping[str, Any], blocks: int) -> list[int]:
    """The blocks that are not there; of what was mined otherwise nothing is left."""
    head, text = parts / "of.json", json.dumps(told, sort_keys=True)
    if not head.exists() or head.read_text(encoding="utf-8") != text:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        replace_text(head, text)
    remove_drafts(parts)
    return [number for number in range(blocks) if not _counts_of(parts, number).exists()]


def _counts_of(parts: Path, number: int) -> Path:
    return parts / f"{number:05d}.json"


def _report(index: Index, mining: MiningConfig, counts: list[Mapping[str, Any]]) -> dict[str, Any]:
    def percentiles(name: str) -> dict[str, float]:
        of_bin = np.sum([of_block[name] for of_block in counts], axis=0)
        if not of_bin.sum():
            return {}
        share = of_bin.cumsum() / of_bin.sum() * 100
        return {f"p{q}": round(float(BINS[np.searchsorted(share, q)]), 3) for q in _PERCENTILES}

    totals = {name: sum(of_block[name] for of_block in counts) for name in _COUNTS}
    return {
        **totals,
        "num_negatives": mining.num_negatives,
        "fell": {name: sum(of_block["fell"][name] for of_block in counts) for name in FILTERS},
        "negative_similarity": percentiles("negative_similarity"),
        "positive_similarity": percentiles("positive_similarity"),
    }
