"""Brings the shards of a run into the shard cache, several at once, ahead of the run."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm

from farnear.data.remote import RemoteFacts
from farnear.data.shard_store import ShardFacts, ShardStore
from farnear.errors import UserError
from farnear.wording import amount, counted

DOWNLOADS_AT_ONCE = 8
"""Threads: they wait for the network, not for the processor."""


@dataclass(frozen=True)
class Brought:
    """Bytes of each shard that was there already, and of each that was downloaded."""

    there: tuple[int, ...]
    downloaded: tuple[int, ...]


def ask_for_facts(urls: Sequence[str], store: ShardStore) -> dict[str, ShardFacts]:
    """What each shard is now; several servers or requests at once. Raises ``UserError``."""
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        return dict(zip(urls, pool.map(store.facts, urls), strict=True))


def refuse_more_than_the_cache_holds(facts: Sequence[ShardFacts], byte_budget: int | None) -> None:
    """Raise ``UserError`` where shards would drive each other out of the cache."""
    total = sum(fact.size for fact in facts)
    if byte_budget is not None and total > byte_budget:
        raise UserError(
            f"the run's {counted(len(facts), 'remote shard')} take {amount(total)}, and data.remote_cache_gb allows "
            f"{amount(byte_budget)}, so that they would drive each other out of the cache and a run without a network "
            f"would miss some; set it to {-(-total // 10**8) / 10:g} or more, or name fewer shards"
        )


def bring_shards(facts: Sequence[ShardFacts], store: ShardStore) -> Brought:
    """Download what is not there. Any number of processes may do this at once, and one that was killed is made up for.

    Raises:
        UserError: A shard cannot be read, has changed, or does not fit on the disk.
    """
    remote = {fact.shard: RemoteFacts(fact.size, fact.etag) for fact in facts}
    # All of them are asked for first, so that what has to go for a download is no shard of this run.
    missing = {url: fact for url, fact in remote.items() if not store.cache.holds(url, fact)}
    given_up = False
    total = sum(fact.size for fact in missing.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="downloading shards", disable=None) as bar,
        ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool,
    ):
        running = {
            pool.submit(store.cache.fetch, url, fact, lambda: not given_up): fact.size for url, fact in missing.items()
        }
        try:
            for done in as_completed(running):
                done.result()
                bar.update(running[done])
        except BaseException:
            # Downloads that run end at their next piece, and the others do not begin.
            given_up = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    there = tuple(fact.size for url, fact in remote.items() if url not in missing)
    return Brought(there, tuple(fact.size for fact in missing.values()))
