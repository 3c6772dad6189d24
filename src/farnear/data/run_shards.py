"""The shards that a run file names, patterns expanded, and how they are read."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from farnear.data.index_cache import ShardSet, SourceShards
from farnear.data.prefetched import Prefetched
from farnear.data.remote import is_remote, short_name, shown
from farnear.data.sample import split_name
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_names import Expand, expand_shards
from farnear.data.shard_store import ShardStore
from farnear.data.tarwalk import Member, NotATarError, walk_members
from farnear.errors import UserError
from farnear.offline import is_offline
from farnear.sections import DataConfig

ONE_SOURCE = "train"
MEMBERS_LOOKED_AT = 256


def shard_store(data: DataConfig, cache: Path) -> ShardStore:
    """How the run reads its shards: with a network, or from what was prefetched (`farnear.offline`).

    Raises:
        UserError: Pairs are to be read over a network, and there is none.
    """
    ranged = data.remote == "ranges"
    if ranged and is_offline() and names_remote_shards(data):
        raise UserError(
            "data.remote: ranges reads every pair over the network, which HF_HUB_OFFLINE forbids; set data.remote: "
            "cache and run `farnear prefetch RUN.yaml` where there is a network"
        )
    return open_store(cache, byte_budget=byte_budget(data), ranged=ranged)


def open_store(cache: Path, *, byte_budget: int | None = None, ranged: bool = False) -> ShardStore:
    """How shards are read that no run file describes; see `ShardCache` and `ShardStore` for the arguments."""
    offline = is_offline()
    shard_cache = ShardCache(cache / "shards", byte_budget, offline=offline)
    return ShardStore(shard_cache, ranged=ranged, prefetched=Prefetched(cache) if offline else None)


def byte_budget(data: DataConfig) -> int | None:
    """Bytes that downloaded shards may take on a node; None for no limit."""
    return None if data.remote_cache_gb is None else int(data.remote_cache_gb * 1e9)


def names_remote_shards(data: DataConfig) -> bool:
    """Whether any shard of the run is behind a URL."""
    of_sources = [pattern for source in data.sources.values() for pattern in (*source.train, *source.corpus)]
    return any(map(is_remote, (*data.train, *data.train_corpus, *of_sources, *data.eval, *data.eval_corpus)))


def shard_sets(data: DataConfig, expand: Expand) -> tuple[ShardSet, ShardSet | None]:
    """The shards of training and of evaluation, patterns expanded; ``expand`` gives the URLs that a URL names.

    Raises:
        UserError: A pattern matches nothing, or a shard stands on both sides.
    """
    if data.sources:
        sources = tuple(
            SourceShards(
                name,
                tuple(expand_shards(source.train, f"data.sources.{name}.train", expand)),
                _optional(source.corpus, f"data.sources.{name}.corpus", expand),
            )
            for name, source in data.sources.items()
        )
        _refuse_shared([shard for source in sources for shard in source.shards])
    else:
        sources = (SourceShards(ONE_SOURCE, tuple(expand_shards(data.train, "data.train", expand))),)
    train_shards = [shard for source in sources for shard in source.shards]
    eval_shards = _optional(data.eval, "data.eval", expand)
    shared = sorted(set(map(_resolved, train_shards)) & set(map(_resolved, eval_shards)))
    if shared:
        raise UserError(
            f"shard {shown(shared[0])} is in data.train and in data.eval, so the evaluation would measure what was "
            "trained; name it on one side"
        )
    exclude = resolve_exclusions(read_exclusions(data.exclude), [*train_shards, *eval_shards])
    of_eval = set(eval_shards)
    in_eval = tuple(pair for pair in exclude if pair[0] in of_eval)
    # What is of no shard is told with the training's faults.
    in_train = tuple(pair for pair in exclude if pair[0] not in of_eval)
    train_corpus = _optional(data.train_corpus, "data.train_corpus", expand)
    train = ShardSet(sources, train_corpus, in_train, data.max_image_pixels)
    if not eval_shards:
        return train, None
    corpus = _optional(data.eval_corpus, "data.eval_corpus", expand)
    evaluated = ShardSet((SourceShards("eval", eval_shards),), corpus, in_eval, data.max_image_pixels)
    return train, evaluated


def shards_to_encode(data: DataConfig, store: ShardStore) -> ShardSet:
    """What `farnear encode` embeds: the pairs and pages of data.train, and the pages of data.train_corpus.

    A shard of data.train without queries is one of pages.

    Raises:
        UserError: A pattern matches nothing, or a shard cannot be read.
    """
    shards = expand_shards(data.train, "SHARDS", store.expand)
    holds = {shard: _holds_queries(shard, store) for shard in shards}
    pairs = tuple(shard for shard in shards if holds[shard])
    pages = [shard for shard in shards if not holds[shard]]
    corpus = dict.fromkeys([*pages, *_optional(data.train_corpus, "--corpus", store.expand)])
    sources = (SourceShards(ONE_SOURCE, pairs),) if pairs else ()
    return ShardSet(sources, tuple(corpus), (), data.max_image_pixels)


def _holds_queries(shard: str, store: ShardStore) -> bool:
    """Whether one of a shard's first members is a query, or names one."""
    try:
        with store.open(shard, store.facts(shard)) as file:
            for member in islice(walk_members(file), MEMBERS_LOOKED_AT):
                if not isinstance(member, Member):
                    continue
                suffix = split_name(member.name)[1].lower()
                if suffix.startswith("query."):
                    return True
                if suffix == "json" and b'"query"' in os.pread(file.fileno(), member.size, member.offset):
                    return True
    except NotATarError:
        return True  # the scan says what is wrong with it
    except OSError as error:
        raise UserError(
            f"shard {shown(shard)} cannot be read ({error.strerror or error}); check its path and permissions"
        ) from None
    return False


def _optional(patterns: Sequence[str], what: str, expand: Expand) -> tuple[str, ...]:
    return tuple(expand_shards(patterns, what, expand)) if patterns else ()


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


def resolve_exclusions(exclusions: Iterable[tuple[str, str]], shards: Sequence[str]) -> list[tuple[str, str]]:
    """The same (shard, key) with each shard as it stands in ``shards``; one that is not there stays as it is.

    A shard is named by its path or URL, without what a URL has behind a ``?``, or by the last part of it. Raises
    ``UserError`` where that is the last part of several.
    """
    of_whole = {shown(shard): shard for shard in shards}
    of_name: dict[str, list[str]] = {}
    for shard in shards:
        of_name.setdefault(short_name(shard), []).append(shard)
    found = []
    for name, key in exclusions:
        alike = [of_whole[name]] if name in of_whole else of_name.get(name, [name])
        if len(alike) > 1:
            raise UserError(
                f"data.exclude names {key!r} of {name}, but {len(alike)} shards are called so, {shown(alike[0])} and "
                f"{shown(alike[1])} among them; name the whole path"
            )
        found.append((alike[0], key))
    return found


def read_exclusions(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(shard name, key) of each line of the files. Raises ``UserError`` for a line that names no pair."""
    for path in paths:
        try:
            lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
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
