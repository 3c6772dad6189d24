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
from pathlib import Path

from farnear.data.remote import RemoteFacts, is_glob, shown
from farnear.errors import UserError
from farnear.files import locked, replace_text
from farnear.offline import PREFETCH

FILE = "prefetched.json"
FORMAT = "farnear prefetched 1"


@dataclass(frozen=True)
class Prefetched:
    """Attributes: the URLs that match each glob, and what each shard was."""

    listings: Mapping[str, list[str]] = field(default_factory=dict)
    facts: Mapping[str, RemoteFacts] = field(default_factory=dict)

    def expand(self, pattern: str) -> list[str]:
        """As ``expand_remote``. Raises ``UserError`` for a glob that was not prefetched."""
        if not is_glob(pattern):
            return [pattern]
        if pattern not in self.listings:
            raise UserError(f"which files match {shown(pattern)} is not known: it was not prefetched. {PREFETCH}")
        return list(self.listings[pattern])

    def facts_of(self, url: str) -> RemoteFacts:
        """As ``remote_facts``. Raises ``UserError`` for a shard that was not prefetched."""
        if url not in self.facts:
            raise UserError(f"shard {shown(url)} was not prefetched, so its pairs would be missing. {PREFETCH}")
        return self.facts[url]


def read_prefetched(cache: Path) -> Prefetched:
    """What is known in a cache folder; nothing where there is no file.

    Raises:
        UserError: The file is damaged, or of another version of farnear.
    """
    path = cache / FILE
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Prefetched()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so what was prefetched is not known; run "
            "`farnear prefetch RUN.yaml` again, where there is a network"
        ) from None


def add_prefetched(cache: Path, new: Prefetched) -> None:
    """Add to what is known in a cache folder. What cannot be read there makes room."""
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{FILE}.lock"):
        try:
            old = read_prefetched(cache)
        except UserError:
            old = Prefetched()
        tree = {
            "format": FORMAT,
            "listings": {**old.listings, **new.listings},
            "shards": {url: asdict(facts) for url, facts in {**old.facts, **new.facts}.items()},
        }
        replace_text(cache / FILE, json.dumps(tree, indent=1) + "\n")


def _parsed(text: str) -> Prefetched:
    tree = json.loads(text)
    if tree["format"] != FORMAT:
        raise ValueError(f"its format is {tree['format']!r} and not {FORMAT!r}")
    facts = {url: RemoteFacts(int(found["size"]), str(found["etag"])) for url, found in tree["shards"].items()}
    return Prefetched({pattern: list(map(str, urls)) for pattern, urls in tree["listings"].items()}, facts)
