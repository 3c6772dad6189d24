"""The shards that a run file names, patterns expanded, and how they are read."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from farnear.config import DataConfig
from farnear.data.index_cache import ShardSet, SourceShards
from farnear.data.remote import is_remote, shown
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_names import expand_shards
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError

ONE_SOURCE = "train"


def shard_store(data: DataConfig, cache: Path) -> ShardStore:
    """How the run reads its shards."""
    budget = None if data.remote_cache_gb is None else int(data.remote_cache_gb * 1e9)
    return ShardStore(ShardCache(cache / "shards", budget), ranged=data.remote == "ranges")


def shard_sets(data: DataConfig) -> tuple[ShardSet, ShardSet | None]:
    """The shards of training and of evaluation, patterns expanded.

    Raises:
        UserError: A pattern matches nothing, or a shard stands on both sides.
    """
    if data.sources:
        sources = tuple(
            SourceShards(
                name,
                tuple(expand_shards(source.train, f"data.sources.{name}.train")),
                _optional(source.corpus, f"data.sources.{name}.corpus"),
            )
            for name, source in data.sources.items()
        )
        _refuse_shared([shard for source in sources for shard in source.shards])
    else:
        sources = (SourceShards(ONE_SOURCE, tuple(expand_shards(data.train, "data.train"))),)
    exclude = tuple(read_exclusions(data.exclude))
    train = ShardSet(sources, _optional(data.train_corpus, "data.train_corpus"), exclude, data.max_image_pixels)
    if not data.eval:
        return train, None
    eval_shards = tuple(expand_shards(data.eval, "data.eval"))
    trained = {_resolved(shard) for source in train.sources for shard in source.shards}
    shared = sorted(trained & {_resolved(shard) for shard in eval_shards})
    if shared:
        raise UserError(
            f"shard {shown(shared[0])} is in data.train and in data.eval, so the evaluation would measure what was "
            "trained; name it on one side"
        )
    corpus = _optional(data.eval_corpus, "data.eval_corpus")
    evaluated = ShardSet((SourceShards("eval", eval_shards),), corpus, (), data.max_image_pixels)
    return train, evaluated


def _optional(patterns: Sequence[str], what: str) -> tuple[str, ...]:
    return tuple(expand_shards(patterns, what)) if patterns else ()


def _resolved(shard: str) -> str:
    return shard if is_remote(shard) else str(Path(shard).resolve())


def _refuse_shared(shards: Sequence[str]) -> None:
    seen = set()
    for shard in map(_resolved, shards):
        if shard in seen:
            raise UserError(
                f"shard {shown(shard)} is in two of data.sources, so its pairs would count twice; name it in one and "
                "give that more weight"
            )
        seen.add(shard)


def read_exclusions(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(shard name, key) of each line of the files. Raises ``UserError`` for a line that names no pair."""
    for path in paths:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.exclude: {path} cannot be read ({error}); check the path") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                shard, key = str(record["shard"]), str(record["key"])
                f"{shard}/{key}".encode()  # JSON can spell halves of characters, which no name holds
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f'data.exclude: {path} line {number} is no JSON object with "shard" and "key", so it names no '
                    "pair; mend or delete the line"
                ) from None
            yield shard, key
