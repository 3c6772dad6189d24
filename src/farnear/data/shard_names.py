"""The shards that a run file names: paths, URLs, globs and braces, as a plain list."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from farnear.data.remote import expand_remote, is_remote
from farnear.errors import UserError

Expand = Callable[[str], list[str]]
"""Gives the URLs that a URL names: itself, or those of the files that match it."""


def expand_shards(patterns: Sequence[str], what: str, expand: Expand = expand_remote) -> list[str]:
    """Absolute paths and URLs of the shards that ``patterns`` name, in their order, sorted within a glob.

    Patterns may hold ``~``, ``{000..007}`` and ``{a,b}`` (expanded first, each must exist) and ``*``, ``?``, ``[...]``
    (at least one match each). ``what`` is how messages call the list. Raises ``UserError``.
    """
    names = list(chain.from_iterable(_expand_one(pattern, what, expand) for pattern in patterns))
    if not names:
        raise UserError(f"{what}: no shard is named, so there is nothing to read; name at least one .tar")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{what}: {name} is named twice, so its pairs would count twice; name each shard once")
        seen.add(name)
    return names


def _expand_one(pattern: str, what: str, expand: Expand) -> list[str]:
    names: list[str] = []
    for name in _expand_braces(os.path.expanduser(pattern), what):
        if is_remote(name):
            names += expand(name)
            continue
        name = re.sub("^file://(localhost)?(?=/)", "", name, flags=re.IGNORECASE)
        if not Path(name).exists() and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise UserError(
                    f"{what}: {name!r} matches no file, so there is nothing to read; paths are taken from the working "
                    f"folder, {os.getcwd()}"
                )
        else:
            matches = [name]
        for match in map(os.path.abspath, matches):
            if not os.path.isfile(match):
                wrong = "is a folder and not a tar" if os.path.isdir(match) else "does not exist"
                raise UserError(f"{what}: {match} {wrong}, so its pairs would be missing; check {pattern!r}")
            names.append(match)
    return names


def _expand_braces(pattern: str, what: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand  # only patterns with braces need the package

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{what}: the braces of {pattern!r} do not match; write them like {{000..007}}") from None
