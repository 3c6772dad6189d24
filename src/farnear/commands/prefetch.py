"""`farnear prefetch`: bring what a run needs into the caches, for nodes that have no network.

Run where there is one, such as on a login node, and with caches that the nodes see too: HF_HOME for the model, and
data.cache_dir or FARNEAR_CACHE for shards and their indexes. Everything that may refuse is asked before the first byte
is downloaded. Killed and started again, it goes on where it was.
"""

import argparse
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING

from farnear.command_line import Parser, add_run_arguments
from farnear.errors import UserError
from farnear.wording import amount, counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farnear.data.shard_store import ShardFacts, ShardStore
    from farnear.model.hub import HubFiles
    from farnear.sections import ModelConfig


def add_prefetch(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `prefetch`."""
    parser = commands.add_parser(
        "prefetch",
        help="bring model and shards into the caches, for nodes without a network",
        description="Download the model and the remote shards of a run file into the caches and index the shards. "
        "With HF_HUB_OFFLINE=1 in its environment the run then asks no network for anything.",
        epilog="example:\n  farnear prefetch run.yaml && HF_HUB_OFFLINE=1 farnear launch run.yaml",
    )
    add_run_arguments(parser, resumes=False)
    parser.set_defaults(command=_prefetch)


def _prefetch(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from huggingface_hub.utils.tqdm import disable_progress_bars

    from farnear.commands.index import tell_index
    from farnear.config import load_config, models_named
    from farnear.data.bring import ask_for_facts, refuse_more_than_the_cache_holds
    from farnear.data.index_cache import cache_folder, cached_index
    from farnear.data.prefetched import Known, add_known
    from farnear.data.remote import RemoteFacts, is_glob, is_remote
    from farnear.data.run_shards import byte_budget, names_remote_shards, shard_sets, shard_store
    from farnear.model.hub import is_folder, look_up, refuse_missing_folder
    from farnear.offline import is_offline

    if not sys.stderr.isatty():
        disable_progress_bars()
    config = load_config(arguments.run_file, arguments.overrides)
    data, models = config.data, models_named(config)
    for model in models:
        refuse_missing_folder(model.name_or_path)
    on_hub, has_urls = [model for model in models if not is_folder(model.name_or_path)], names_remote_shards(data)
    if has_urls and data.remote == "ranges":
        raise UserError(
            "data.remote: ranges reads every pair over the network and keeps no shard, so there is nothing to fetch "
            "ahead; set data.remote: cache"
        )
    if (on_hub or has_urls) and is_offline():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it, where there is a network")
    cache = cache_folder(data.cache_dir)
    store = shard_store(data, cache)
    listings: dict[str, list[str]] = {}

    def expand(pattern: str) -> list[str]:
        found = store.expand(pattern)
        if is_glob(pattern):
            listings[pattern] = found
        return found

    sets = dict(zip(("training", "evaluation"), shard_sets(data, expand), strict=True))
    urls = list(dict.fromkeys(shard for of in sets.values() if of for shard, _ in of.shards() if is_remote(shard)))
    facts = ask_for_facts(urls, store)
    refuse_more_than_the_cache_holds(list(facts.values()), byte_budget(data))

    for model in models:
        if model in on_hub:
            _bring_model(model, look_up(model))
        else:
            print(f"model {model.name_or_path}: a folder, nothing to fetch", flush=True)
    store = replace(store, known=facts)
    _bring_shards(list(facts.values()), store)
    for name, shard_set in sets.items():
        if shard_set is not None:
            tell_index(name, cached_index(shard_set, cache, store))
    if facts:
        add_known(cache, Known(listings, {url: RemoteFacts(of.size, of.etag) for url, of in facts.items()}))
    words = ["farnear", "launch", str(arguments.run_file), *arguments.overrides]
    print(f"on nodes without a network: {' '.join(_variables(data.cache_dir))} {shlex.join(words)}", flush=True)
    return 0


def _variables(cache_dir: str | None) -> "Iterator[str]":
    """With which a run finds what was brought: nodes need not have those of this machine."""
    yield "HF_HUB_OFFLINE=1"
    for name in ("HF_HOME", "HF_HUB_CACHE", *(() if cache_dir else ("FARNEAR_CACHE",))):
        if folder := os.environ.get(name):
            yield f"{name}={shlex.quote(os.path.abspath(os.path.expanduser(folder)))}"


def _bring_model(model: "ModelConfig", files: "HubFiles") -> None:
    from farnear.model.hub import fetch

    began = time.monotonic()
    fetch(model, files)
    _tell(f"model {model.name_or_path} at {files.commit}", "file", files.missing, files.there, began)
    if files.ignored:
        print(f"{counted(len(files.ignored), 'file')} left out: the same weights in other formats", flush=True)
    if model.revision != files.commit:
        print(
            f"its revision {model.revision or 'main'} may change; model.revision={files.commit} holds on to this one",
            flush=True,
        )


def _bring_shards(facts: "Sequence[ShardFacts]", store: "ShardStore") -> None:
    from farnear.data.bring import bring_shards

    if not facts:
        print("shards: files, nothing to fetch", flush=True)
        return
    began = time.monotonic()
    brought = bring_shards(facts, store)
    _tell(f"shards in {store.cache.folder}", "shard", brought.downloaded, brought.there, began)


def _tell(what: str, one: str, brought: "Sequence[int]", there: "Sequence[int]", began: float) -> None:
    seconds = time.monotonic() - began
    print(
        f"{what}: {counted(len(brought), one)}, {amount(sum(brought))}, downloaded in {seconds:,.1f} s; "
        f"{counted(len(there), one)}, {amount(sum(there))}, were there already",
        flush=True,
    )
