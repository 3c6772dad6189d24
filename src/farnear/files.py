"""Files that others read, while and after they are written: whole or not there, and with the usual permissions."""

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which stands at ``path`` when the block ends without an error.

    A reader sees the old file or the whole new one, whoever else writes it too. What a writer that is killed leaves is
    named `.NAME.*.tmp`.
    """
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        if error.filename:
            raise
        # A full disk does not say where, nor NumPy what.
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error
    finally:
        fresh.unlink(missing_ok=True)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    with published(path) as file:
        file.write(text.encode("utf-8"))


def remove_drafts(folder: Path) -> None:
    """Remove what writers of files in a folder have left when they were killed; for one who knows that none is left."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all that lock ``path``, a folder, or a file that is made and stays. A kill leaves no lock behind."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file's content, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring all files below a folder, and their names, to the disk."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def give_usual_mode(path: Path) -> None:
    """The permissions that `open` would have given: safetensors writes files that only their owner may read."""
    path.chmod(0o666 & ~_UMASK)


def _umask() -> int:
    """It can only be read by setting it, for all threads; so it is read once, before there are any."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


_UMASK = _umask()


def readable_lines(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """The records of a file, as far as they can be read; none where it is not there.

    Args:
        last: So many lines at its end; 0 for all.
    """
    records = []
    with suppress(OSError):
        for line in path.read_bytes().splitlines()[-last:]:
            with suppress(ValueError):  # a kill came in the middle of it
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
