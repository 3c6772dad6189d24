"""Files that others read, while and after they are written: whole or not there, and with the usual permissions."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part, whoever else writes it too."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring renames in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_mode(path: Path) -> None:
    """The permissions that `open` would have given: safetensors writes files that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
