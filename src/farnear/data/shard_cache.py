"""Whole shards on a node's own disk: each is downloaded once for all processes of the node, and kept within a budget.

    NAME-HASH          a complete shard; HASH stands for url, size and etag, so a changed object is another entry
    NAME-HASH.part     one that is being downloaded, from the start as long as it will be
    .budget            locked while sizes are added up, entries deleted, room reserved and a download published

A download is its own lock: who wants a shard that is not there opens its .part and takes an exclusive flock on it. The
first has it and downloads, the others wait, and find the shard, or an unlocked and deleted .part after a failure and
try themselves. The kernel drops the lock of a process that is killed; what such a process leaves is deleted by the next
download, which sees that nobody holds it. A .part becomes an entry by a rename, after its bytes reached the disk, so an
entry is always whole.

The budget counts the lengths of all files in the folder. A .part has its full length before its first byte is written,
so downloads of other processes are counted too, and the sum never exceeds the budget. Room is made by deleting the
entries that were asked for the longest ago. Whoever has one of them open keeps reading it, as POSIX lets him; its space
comes back when he closes it, and until then the disk holds that much more than the budget.

Files with other names are left alone and not counted. The folder must be on a disk of the node: flock does not work
between processes on every network file system.
"""

import fcntl
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from farnear.data.remote import USUAL, Patience, RemoteFacts, read_pieces, shown
from farnear.errors import UserError
from farnear.offline import PREFETCH

_PART = ".part"
_BUDGET_LOCK = ".budget"
_OURS = re.compile(r".*-[0-9a-f]{32}(\.part)?")
_SECONDS_BETWEEN_LOOKS = 0.1  # while running downloads hold the whole budget


class NoLongerWantedError(Exception):
    """A download was given up because its caller said so."""


class ShardCache:
    """The shards in ``folder``. Any number of processes and threads may use it, and it can be sent to a process.

    Args:
        folder: Made if it is missing.
        byte_budget: Bytes that all shards and downloads in it may have together; None for no limit. All users of a
            folder should give the same.
        patience: With the network.
        offline: Whether there is none, so that a shard must be there already.
    """

    def __init__(
        self, folder: Path, byte_budget: int | None = None, patience: Patience = USUAL, *, offline: bool = False
    ) -> None:
        self.folder = folder
        self.byte_budget = byte_budget
        self.patience = patience
        self.offline = offline

    def open(self, url: str, facts: RemoteFacts, wanted: Callable[[], bool] = lambda: True) -> io.FileIO:
        """The complete shard, downloaded if it is not there. The file stays readable when its entry is deleted.

        Args:
            url: Of the object.
            facts: What it was when it was indexed.
            wanted: Asked between pieces of a download, which ends when this says no.

        Raises:
            UserError: The object cannot be read or was changed, is larger than the budget, or does not fit on the disk;
                offline, it is not there.
            NoLongerWantedError: ``wanted`` said no.
        """
        if self.byte_budget is not None and facts.size > self.byte_budget:
            raise UserError(
                f"{shown(url)} has {facts.size} bytes and its cache {self.folder} may hold {self.byte_budget}, so "
                f"it can never be kept; raise the budget or write smaller shards"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entry = self.folder / _entry_name(url, facts)
            while True:
                file = _open_entry(entry, facts.size)
                if file is not None:
                    return file
                if self.offline:
                    raise self._missing(url)
                with _owned(_part_of(entry)) as part:
                    # Whoever had the lock before may have brought the shard.
                    if part is not None and not entry.exists():
                        self._reserve(part, facts.size, wanted)
                        return self._download(part, entry, url, facts, wanted)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"the shard cache {self.folder} cannot take {shown(url)} ({reason}), so it cannot be read; check the "
                f"folder's permissions and the space on its disk, or set a smaller byte budget"
            ) from error

    def fetch(self, url: str, facts: RemoteFacts, wanted: Callable[[], bool] = lambda: True) -> None:
        """See that the shard is there. Arguments and errors as in ``open``."""
        self.open(url, facts, wanted).close()

    def refuse_missing(self, facts_of_url: Mapping[str, RemoteFacts]) -> None:
        """Without a network, raise ``UserError`` for the first shard that is not there."""
        for url, facts in facts_of_url.items():
            if self.offline and not self.holds(url, facts):
                raise self._missing(url)

    def _missing(self, url: str) -> UserError:
        return UserError(
            f"shard {shown(url)} is not in the shard cache {self.folder}, or was cut off there. {PREFETCH}"
        )

    def holds(self, url: str, facts: RemoteFacts) -> bool:
        """Whether the whole shard is there; if so, it counts as used now."""
        file = _open_entry(self.folder / _entry_name(url, facts), facts.size)
        if file is not None:
            file.close()
        return file is not None

    def discard(self, url: str, facts: RemoteFacts) -> None:
        """Delete the entry of a shard whose bytes are not right. Whoever has it open keeps what he has."""
        (self.folder / _entry_name(url, facts)).unlink(missing_ok=True)

    def _download(
        self, part: io.BufferedRandom, entry: Path, url: str, facts: RemoteFacts, wanted: Callable[[], bool]
    ) -> io.FileIO:
        with closing(read_pieces(url, 0, facts.size, facts, self.patience)) as pieces:
            for piece in pieces:
                if not wanted():
                    raise NoLongerWantedError
                part.write(piece)
        part.flush()
        os.fsync(part.fileno())
        # Opened before anybody else can see the entry and delete it.
        file = io.FileIO(str(_part_of(entry)))
        try:
            # A sum that is made during the rename could miss the file under both names.
            with self._budget_lock():
                os.replace(_part_of(entry), entry)
        except BaseException:
            file.close()
            raise
        return file

    def _reserve(self, part: io.BufferedRandom, size: int, wanted: Callable[[], bool]) -> None:
        """Give ``part`` its full length, as soon as there is room for it."""
        while wanted():
            with self._budget_lock():
                if self._make_room(size):
                    os.truncate(part.fileno(), size)
                    return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise NoLongerWantedError

    def _make_room(self, size: int) -> bool:
        """Delete what nobody downloads any more, and the oldest entries; False when running downloads take the room."""
        entries: list[tuple[int, int, Path]] = []
        bytes_downloading = 0
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                if path.name.endswith(_PART):
                    bytes_downloading += _size_unless_abandoned(path)
                else:
                    found = path.stat()
                    entries.append((found.st_mtime_ns, found.st_size, path))
        if self.byte_budget is None:
            return True
        room = self.byte_budget - bytes_downloading - size
        if room < 0:
            return False
        total = sum(entry_size for _, entry_size, _ in entries)
        for _, entry_size, path in sorted(entries):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= entry_size
        return True

    @contextmanager
    def _budget_lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _BUDGET_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _entry_name(url: str, facts: RemoteFacts) -> str:
    digest = hashlib.blake2b(f"{url}\n{facts.size}\n{facts.etag}".encode(), digest_size=16).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", shown(url).rpartition("/")[2])[-80:]
    return f"{readable}-{digest}"


def _part_of(entry: Path) -> Path:
    return entry.with_name(entry.name + _PART)


def _open_entry(entry: Path, size: int) -> io.FileIO | None:
    """The entry, marked as used now, or None if it is not there."""
    try:
        file = io.FileIO(str(entry))
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        # Cut by somebody else, or by a disk that lost it.
        file.close()
        entry.unlink(missing_ok=True)
        return None
    with suppress(PermissionError):  # whoever shares a cache may read what another has brought
        os.utime(file.fileno())
    return file


@contextmanager
def _owned(path: Path) -> Iterator[io.BufferedRandom | None]:
    """Wait for the lock of a .part and yield it, or None when it was published or deleted in the meantime.

    What was not published is deleted at the end.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not _is_at(descriptor, path):
            yield None
            return
        # Leaves the descriptor, and with it the lock, to the outer `finally`.
        with open(descriptor, "r+b", closefd=False) as part:
            yield part
    finally:
        if _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is the name of the open file. Nobody but the owner of its lock changes that."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _size_unless_abandoned(part: Path) -> int:
    """The length of a .part; one that nobody downloads is deleted and counts 0."""
    descriptor = os.open(part, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(descriptor).st_size
        if _is_at(descriptor, part):
            part.unlink()
        return 0
    finally:
        os.close(descriptor)
