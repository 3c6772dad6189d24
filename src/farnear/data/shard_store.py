"""Where the bytes of a shard come from: a file, a whole-shard cache of a URL, or single ranges of a URL.

A shard is opened when it is first needed and stays open with at most 255 others. A worker process opens its own: with a
descriptor shared between processes the kernel would see their reads as one stream and misjudge its read-ahead.

Offsets are worth nothing in a shard that was written again, so its size, and behind a URL its etag, is compared with
what was indexed.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from farnear.data.prefetched import Prefetched
from farnear.data.remote import RemoteFacts, expand_remote, is_remote, read_range, remote_facts, shown
from farnear.data.shard_cache import ShardCache
from farnear.errors import UserError

_OPEN_SHARDS = 256
CHANGED = "so it was changed after it was indexed; start again, and what changed is indexed anew"


@dataclass(frozen=True)
class ShardFacts:
    """What tells a shard from itself at another time: size in bytes, etag of a URL, time of change of a file."""

    shard: str
    size: int
    etag: str = ""
    mtime_ns: int = 0


@dataclass(frozen=True)
class ShardStore:
    """How shards are read. It can be sent to another process.

    Attributes:
        cache: Keeps shards behind URLs as files.
        ranged: Whether pairs are read from URLs one by one instead; scanning still takes whole shards.
        known: Facts of shards that somebody has asked for already.
        prefetched: What is known of URLs without a network; None where the servers are asked.
    """

    cache: ShardCache
    ranged: bool = False
    known: Mapping[str, ShardFacts] = field(default_factory=dict)
    prefetched: Prefetched | None = None

    def expand(self, pattern: str) -> list[str]:
        """The URLs that a URL names, itself or those of the files that match it. Raises ``UserError``."""
        return expand_remote(pattern) if self.prefetched is None else self.prefetched.expand(pattern)

    def facts(self, shard: str) -> ShardFacts:
        """The shard as it is now. Raises ``UserError`` where it is missing or cannot be read."""
        if shard in self.known:
            return self.known[shard]
        if is_remote(shard):
            facts = remote_facts(shard) if self.prefetched is None else self.prefetched.facts(shard)
            return ShardFacts(shard, facts.size, facts.etag)
        try:
            status = os.stat(shard)
        except OSError as error:
            raise UserError(
                f"shard {shard} cannot be read ({error.strerror or error}); check its path and permissions"
            ) from None
        return ShardFacts(shard, status.st_size, "", status.st_mtime_ns)

    def try_out(self) -> None:
        """See that the known shards can be read as they will be: the first batch would be too late to say so.

        Raises ``UserError`` for a server that sends whole objects only, if pairs are to be read one by one, and without
        a network for a shard that is not in the cache.
        """
        remote = {shard: facts for shard, facts in self.known.items() if is_remote(shard)}
        self.cache.refuse_missing({shard: RemoteFacts(facts.size, facts.etag) for shard, facts in remote.items()})
        shard_of_server = {shard.split("/")[2]: shard for shard in remote} if self.ranged else {}
        for shard in shard_of_server.values():
            facts = self.known[shard]
            read_range(shard, 0, min(1, facts.size), RemoteFacts(facts.size, facts.etag))

    def open(self, shard: str, facts: ShardFacts) -> io.FileIO:
        """The whole shard as a file. Raises OSError, and ``UserError`` where it is another one than ``facts`` says."""
        if is_remote(shard):
            return self.cache.open(shard, RemoteFacts(facts.size, facts.etag))
        file = io.FileIO(shard)
        size = os.fstat(file.fileno()).st_size
        if size != facts.size:
            file.close()
            raise UserError(f"shard {shard} has {size} bytes and its index says {facts.size}, {CHANGED}")
        return file


class OpenShards:
    """Reads ranges of shards and keeps the most recently used ones open. It can be sent to another process."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self._file_of_shard: OrderedDict[str, io.FileIO] = OrderedDict()
        self._fetched_again: set[str] = set()

    def __reduce__(self) -> tuple[type["OpenShards"], tuple[ShardStore]]:
        # Open files stay where they are.
        return OpenShards, (self.store,)

    def read(self, facts: ShardFacts, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``. Raises ``UserError`` where the shard cannot be read or is another one."""
        if self.store.ranged and is_remote(facts.shard):
            return read_range(facts.shard, offset, offset + size, RemoteFacts(facts.size, facts.etag))
        try:
            file = self._open(facts)
            pieces = []
            end = offset + size
            while offset < end:  # one pread may return less than asked
                piece = os.pread(file.fileno(), end - offset, offset)
                if not piece:
                    name = shown(facts.shard)
                    raise UserError(f"shard {name} ends at byte {offset} and its index says {end}, {CHANGED}")
                pieces.append(piece)
                offset += len(piece)
        except OSError as error:
            raise UserError(
                f"shard {shown(facts.shard)} cannot be read ({error.strerror or error}); check its path and its disk"
            ) from error
        return b"".join(pieces)

    def fetch_again(self, facts: ShardFacts) -> bool:
        """Throw away the copy of a shard behind a URL, so that the next read brings another.

        False if there is none, or if that was done already: what is wrong then is wrong where it comes from.
        """
        if not is_remote(facts.shard) or self.store.ranged or self.store.cache.offline:
            return False
        if facts.shard in self._fetched_again:
            return False
        self._fetched_again.add(facts.shard)
        if file := self._file_of_shard.pop(facts.shard, None):
            file.close()
        self.store.cache.discard(facts.shard, RemoteFacts(facts.size, facts.etag))
        return True

    def close(self) -> None:
        """Close the open shards. They are opened again when they are needed."""
        while self._file_of_shard:
            self._file_of_shard.popitem()[1].close()

    def _close_evicted(self) -> None:
        """Let go of shards that the cache has deleted: while they are open, the disk still holds them."""
        for shard, file in list(self._file_of_shard.items()):
            if is_remote(shard) and os.fstat(file.fileno()).st_nlink == 0:
                self._file_of_shard.pop(shard).close()

    def _open(self, facts: ShardFacts) -> io.FileIO:
        file = self._file_of_shard.get(facts.shard)
        if file is not None:
            self._file_of_shard.move_to_end(facts.shard)
            return file
        self._close_evicted()
        file = self.store.open(facts.shard, facts)
        if len(self._file_of_shard) >= _OPEN_SHARDS:
            self._file_of_shard.popitem(last=False)[1].close()
        self._file_of_shard[facts.shard] = file
        return file
