"""`farnear shards index`, `inspect` and `verify`: what shards hold, and what is wrong with them.

Shards are named by patterns, or by the run file that trains on them. All three use the cache that a run uses, so a run
finds what they have scanned.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, positive
from farnear.errors import UserError
from farnear.wording import counted

if TYPE_CHECKING:
    from farnear.data.faults import Fault
    from farnear.data.index import Index
    from farnear.data.index_cache import ShardSet
    from farnear.data.shard_store import ShardStore


def add_index(sources: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that look into shards."""
    _add(
        sources,
        "index",
        _index,
        help="scan shards once, so that a run starts at once",
        description="Scan shards with several processes and keep what was found in the cache folder; only shards that "
        "changed are scanned again. Prints a table of faults: damaged places, samples that are not whole, and the "
        "pairs that they cost.",
        epilog="examples:\n  farnear shards index 'pages-{000..511}.tar'\n  farnear shards index run.yaml",
    )
    _add(
        sources,
        "inspect",
        _inspect,
        help="show what is in shards",
        description="Count pairs, documents, hard negatives and duplicates; show sizes, faults, ignored members and "
        "the first pairs.",
        epilog="example:\n  farnear shards inspect 'pairs-*.tar' --corpus 'pages-*.tar'",
    )
    verify = _add(
        sources,
        "verify",
        _verify,
        help="read every byte of shards again and decode every page",
        description="Compare every member with what was indexed and decode every image. Prints a table of faults, and "
        "exits with 2 if there is any.",
        epilog="example:\n  farnear shards verify 'pairs-*.tar'",
    )
    verify.add_argument(
        "--write-exclude", metavar="FILE", type=Path, help="write the pairs that cannot be used, for data.exclude"
    )


def _add(
    sources: "argparse._SubParsersAction[Parser]",
    name: str,
    command: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    epilog: str,
) -> Parser:
    parser = sources.add_parser(name, help=help, description=description, epilog=epilog)
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="*", help="of pairs: paths, URLs, globs; or RUN.yaml [key=value ...]"
    )
    parser.add_argument(
        "--corpus", metavar="SHARDS", nargs="+", default=[], help="shards of pages that pairs name by pos_id"
    )
    parser.add_argument("--cache-dir", help="in place of $FARNEAR_CACHE or ~/.cache/farnear")
    parser.add_argument("--processes", type=positive, help="that read at once (default: as many as pay)")
    parser.set_defaults(command=command)
    return parser


def _index(arguments: argparse.Namespace) -> int:
    from farnear.data.index_cache import cached_index

    for name, shard_set, cache, store in _shard_sets(arguments):
        tell_index(name, cached_index(shard_set, cache, store, processes=arguments.processes))
    return 0


def tell_index(name: str, index: "Index") -> None:
    """Print what an index holds, what is wrong with its shards, and where it is kept."""
    from farnear.data.faults import fault_table, pairs_lost
    from farnear.data.summary import ignored_members

    documents = f", {len(index.corpus_C):,} documents in corpus shards" if len(index.corpus_C) else ""
    wrong = []
    if index.faults:
        wrong.append(
            f"{counted(len(index.faults), 'fault')}, at least {counted(pairs_lost(index.faults), 'pair')} lost"
        )
    if index.ignored_members:
        wrong.append(f"{ignored_members(index)} ignored")
    print(
        f"{name}: {counted(len(index), 'pair')}{documents} in {counted(len(index.shards), 'shard')}, "
        f"{', '.join(wrong) or 'nothing wrong with them'}"
    )
    if index.faults:
        print(fault_table(index.faults))
    print(f"kept in {index.path}", flush=True)


def _inspect(arguments: argparse.Namespace) -> int:
    from farnear.data.index_cache import cached_index
    from farnear.data.summary import summary_text

    for name, shard_set, cache, store in _shard_sets(arguments):
        index = cached_index(shard_set, cache, store, processes=arguments.processes)
        print(f"{name}\n{summary_text(index, store)}\n", flush=True)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from farnear.data.faults import fault_table, pairs_lost
    from farnear.data.remote import shown
    from farnear.data.verify import verify_shards
    from farnear.files import replace_text

    if arguments.write_exclude is not None and arguments.write_exclude.exists():
        # It may be the very list that a run file excludes by, and holds what is not looked at any more.
        raise UserError(
            f"{arguments.write_exclude} exists and is not replaced; name another file, or move that one away"
        )
    faults: list[Fault] = []
    new_faults = 0
    exclusions: list[str] = []
    for name, shard_set, cache, store in _shard_sets(arguments):
        found = verify_shards(shard_set, cache, store, processes=arguments.processes)
        index = found.index
        of_set = [*index.faults, *found.faults]
        faults += of_set
        new_faults += len(found.faults)
        for pair in found.lost:
            shard = shown(index.shards[index.pair_shard_N[pair]])
            exclusions.append(json.dumps({"shard": shard, "key": index.pair_key[pair]}) + "\n")
        size = int(index.shard_size_S.sum()) / 1e6
        print(
            f"{name}: {counted(len(index.shards), 'shard')}, {size:,.1f} MB, {counted(len(index), 'pair')}, "
            f"{counted(len(of_set), 'fault')}",
            flush=True,
        )
        if of_set:
            print(fault_table(of_set), flush=True)
    if arguments.write_exclude is not None:
        replace_text(arguments.write_exclude, "".join(exclusions))
        print(f"{counted(len(exclusions), 'pair')} for data.exclude in {arguments.write_exclude}")
    if faults:
        # What indexing found every run leaves out by itself; what was found now it would meet on its way.
        how = "raise data.max_bad_fraction, up to which a run leaves them out"
        if new_faults:
            how = "leave the pairs out with data.exclude"
            if arguments.write_exclude is None:
                how += " (--write-exclude FILE names them, but for those that indexing leaves out)"
        raise UserError(
            f"{counted(len(faults), 'fault')} cost at least {counted(pairs_lost(faults), 'pair')}; write or copy the "
            f"shards again, or {how}"
        )
    return 0


def _shard_sets(arguments: argparse.Namespace) -> "Iterator[tuple[str, ShardSet, Path, ShardStore]]":
    """(name, shards, cache folder, how they are read) of what the command line names."""
    from farnear.data.index_cache import ShardSet, SourceShards, cache_folder
    from farnear.data.shard_names import expand_shards

    if arguments.shards and Path(arguments.shards[0]).suffix in (".yaml", ".yml"):
        from farnear.config import load_config
        from farnear.data.run_shards import shard_sets, shard_store

        if arguments.corpus:
            raise UserError("--corpus goes with shards; a run file names its own: data.train_corpus, data.eval_corpus")
        data = load_config(arguments.shards[0], arguments.shards[1:]).data
        cache = cache_folder(arguments.cache_dir or data.cache_dir)
        store = shard_store(data, cache)
        for name, shard_set in zip(("training", "evaluation"), shard_sets(data, store.expand), strict=True):
            if shard_set is not None:
                yield name, shard_set, cache, store
    else:
        from farnear.data.run_shards import open_store

        cache = cache_folder(arguments.cache_dir)
        store = open_store(cache)
        corpus = tuple(expand_shards(arguments.corpus, "--corpus", store.expand)) if arguments.corpus else ()
        shards: tuple[str, ...] = ()
        if arguments.shards or not corpus:
            shards = tuple(expand_shards(arguments.shards, "SHARDS", store.expand))
        yield "shards", ShardSet((SourceShards("shards", shards),) if shards else (), corpus), cache, store
