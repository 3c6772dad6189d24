"""Small shards in which everything that can make a positive of a page occurs, and an embedder of colours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tar_makers import image_bytes, index_of, number_of_image, write_tar

from farnear.data.index import Index

PAGES = 8
SPELLINGS = ("which page", "WHICH  page", "Which Page ")


def pairs_strategy() -> Any:
    """Pairs as (query, spelling, page that stands with it or None, keys of positives, keys of negatives)."""
    keys = st.lists(st.integers(0, 2 * PAGES - 1), max_size=3)
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2), st.none() | st.integers(0, PAGES - 1), keys, keys)
    return st.lists(pair.filter(lambda one: one[2] is not None or one[3]), min_size=1, max_size=7)


def write_shards(folder: Path, pairs: Sequence[tuple[int, int, int | None, list[int], list[int]]]) -> Index:
    """Corpus pages p0 to p15, of which p8 to p15 have the contents of p0 to p7; pages of pairs are copies of those."""
    corpus = write_tar(folder / "corpus.tar", [(f"p{key}.png", image_bytes(key % PAGES)) for key in range(2 * PAGES)])
    members = []
    for number, (query, spelling, page, positives, negatives) in enumerate(pairs):
        record = {
            "query": f"{SPELLINGS[spelling]} {query}",
            "pos_ids": [f"p{key}" for key in positives],
            "neg_ids": [f"p{key}" for key in negatives],
        }
        members.append((f"k{number}.json", json.dumps(record).encode()))
        if page is not None:
            members.append((f"k{number}.png", image_bytes(page)))
    return index_of([write_tar(folder / "pairs.tar", members)], corpus=[corpus])


def answers(pairs: Sequence[tuple[int, int, int | None, list[int], list[int]]], number: int) -> set[int]:
    """Contents that answer pair ``number``'s query: of all pairs that ask it."""
    alike = [one for one in pairs if one[0] == pairs[number][0]]
    return {page for one in alike for page in [one[2]] if page is not None} | {
        key % PAGES for one in alike for key in one[3]
    }


def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
    """The number of a page, or minus that of a query."""
    numbers = [number_of_image(one) if side == "document" else -1 - int(one.split()[-1]) for one in inputs]
    return {"number": torch.tensor(numbers)}


_COLOURS = torch.nn.functional.normalize(torch.randn(70_000, 16, generator=torch.Generator().manual_seed(3)), dim=1)


class Colours:
    """A strategy whose embedder knows numbers alone."""

    forward_is_collective = False
    loss_scale = None

    def __init__(self) -> None:
        self.embedding = _COLOURS.clone()
        self.batches = 0

    def forward(self, features: Mapping[str, Any]) -> torch.Tensor:
        self.batches += 1
        return self.embedding[features["number"] % len(self.embedding)]

    def train(self, mode: bool) -> None:
        self.mode = mode

    def full_weights(self) -> dict[str, torch.Tensor]:
        return {"embedding": self.embedding}


def page_tokens(width: Any, height: Any) -> Any:
    return np.asarray(width) * height
