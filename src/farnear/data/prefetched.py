"""What `farnear prefetch` knew of shards behind URLs, for runs that cannot ask.

A run asks a server which files match a glob, and for the size and etag of each shard. Both are kept in one file of the
cache folder, `prefetched.json`, beside the shards themselves:

    {"format": ..., "listings": {pattern: [url, ...]}, "shards": {url: {"size": bytes, "etag": ...}}}

One rule decides when it is used: with HF_HUB_OFFLINE set only the file is asked, without it only the server. So a run
never mixes what was with what is. The file is written when all shards of a run file have been brought, and run files
that share a cache folder share it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from farnear.data.remote import RemoteFacts, is_glob, shown
from farnear.errors import UserError
from farnear.files import locked, replace_text
from farnear.offline import PREFETCH

FILE = "prefetched.json"
FORMAT = "farnear prefetched 1"


@dataclass(frozen=True)
class Known:
    """The URLs that match each glob, and what each shard was."""

    listings: Mapping[str, list[str]] = field(default_factory=dict)
    facts: Mapping[str, RemoteFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefetched:
    """Answers from the file in a cache folder, which is read when it is first asked for."""

    cache: Path

    @cached_property
    def known(self) -> Known:
        """All of it. Raises ``UserError`` for a file that is damaged, or of another version of farnear."""
        return read_known(self.cache)

    def expand(self, pattern: str) -> list[str]:
        """As ``expand_remote``. Raises ``UserError`` for a glob that was not prefetched."""
        if not is_glob(pattern):
            return [pattern]
        if pattern not in self.known.listings:
            raise UserError(f"which files match {shown(pattern)} is not known: it was not prefetched. {PREFETCH}")
        return list(self.known.listings[pattern])

    def facts(self, url: str) -> RemoteFacts:
        """As ``remote_facts``. Raises ``UserError`` for a shard that was not prefetched."""
        if url not in self.known.facts:
            raise UserError(f"shard {shown(url)} was not prefetched, so its pairs would be missing. {PREFETCH}")
        return self.known.facts[url]


def read_known(cache: Path) -> Known:
    """What the file of a cache folder holds; nothing where there is none.

    Raises:
        UserError: It is damaged, or of another version of farnear.
    """
    path = cache / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']!r} and not {FORMAT!r}")
        facts = {url: RemoteFacts(int(found["size"]), str(found["etag"])) for url, found in tree["shards"].items()}
        return Known({pattern: list(map(str, urls)) for pattern, urls in tree["listings"].items()}, facts)
    except FileNotFoundError:
        return Known()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so what was prefetched is not known; run "
            "`farnear prefetch RUN.yaml` again, where there is a network"
        ) from None


def add_known(cache: Path, new: Known) -> None:
    """Add to the file of a cache folder. One that cannot be read makes room."""
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{FILE}.lock"):
        try:
            old = read_known(cache)
        except UserError:
            old = Known()
        tree = {
            "format": FORMAT,
            "listings": {**old.listings, **new.listings},
            "shards": {url: asdict(facts) for url, facts in {**old.facts, **new.facts}.items()},
        }
        replace_text(cache / FILE, json.dumps(tree, indent=1) + "\n")
