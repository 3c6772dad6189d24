"""An export as a folder of files: what belongs to it, by the list that was written with it."""

import json
from pathlib import Path

from farnear.errors import UserError

CARD = "README.md"
"""The model's card, which a person may mend."""

LIST = "farnear.json"
"""Holds the name and size of every other file of the export."""


def files_of(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path there."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def whole_export(folder: Path) -> dict[str, int]:
    """Bytes of the files of an export, its card and its list among them.

    Raises:
        UserError: It is none, a file is missing or of another size, or one is there that is not of the export.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name an export, or the run folder that holds one")
    try:
        listed = json.loads((folder / LIST).read_text(encoding="utf-8"))["files"]
        wanted = {str(name): int(size) for name, size in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder} is no export of farnear, as it has no {LIST} that lists its files; make one with "
            "`farnear export RUN OUT`"
        ) from None
    found = files_of(folder)
    for name, size in wanted.items():
        if found.get(name) != size:
            has = f"has {found[name]:,} bytes, not {size:,}" if name in found else "is missing"
            raise UserError(f"export {folder} is not whole: {name} {has}; make it again with `farnear export RUN OUT`")
    if CARD not in found:
        raise UserError(f"export {folder} has no {CARD}, its card; make it again with `farnear export RUN OUT`")
    if odd := sorted(found.keys() - wanted.keys() - {CARD, LIST}):
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"{folder} holds {odd[0]}{more}, which is not of the export; move it out")
    return found
