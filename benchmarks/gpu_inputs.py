"""What `gpu_step.py` and `gpu_zero.py` train on: pages of noise and queries of mixed lengths, however they are cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from farnear.data.batch import MiniBatch, RankBatch
from farnear.data.budget import cut
from farnear.data.dealing import SIDES
from farnear.model.embedder import Preprocessing
from farnear.model.features import FeatureMerger
from farnear.model.pixels import PixelBytes

WORDS = ("revenue", "costs", "chart", "page", "table", "report", "2019", "2021", "quarter", "annual", "of", "the", "in")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        text, vision: What differs from the tiny model's config.
        pairs: The global batch.
        trial_pairs: The batch on which sizes are chosen.
        page_side: In pixels; different ones follow each other.
        distinct_pages: That are drawn and preprocessed.
        pages_at_once: Sizes that are tried; farnear's budget is as many tokens as so many pages have.
        dims: Matryoshka dimensions.
        bf16: Else fp32.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    pairs: int
    trial_pairs: int
    page_side: tuple[int, ...]
    distinct_pages: int
    pages_at_once: tuple[int, ...]
    dims: tuple[int, ...]
    bf16: bool


class Inputs:
    """Pages and queries, and their features however they are cut.

    Each page is preprocessed once, and mini-batches are put together from that: a page a thousand times over takes as
    long to train on as a thousand pages.

    Args:
        model: Whose preprocessing it is; its weights are not looked at.
    """

    def __init__(self, model: SentenceTransformer, setting: Setting) -> None:
        rng = np.random.default_rng(0)
        self._model, self._merge, self._preprocess = model, FeatureMerger(model), Preprocessing(model)
        self.queries = [" ".join(rng.choice(WORDS, rng.integers(3, 60))) + f" {n}" for n in range(setting.pairs)]
        sides = [setting.page_side[n % len(setting.page_side)] for n in range(setting.distinct_pages)]
        pages = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in sides]
        self._ours = [self._preprocess([page], "document") for page in pages]
        self._theirs = [dict(model.preprocess([page])) for page in pages]
        self.page_tokens_n = np.array([int(features["attention_mask"].sum()) for features in self._theirs])
        self._patches_n = [int(features["image_grid_thw"].prod()) for features in self._theirs]
        # Gigabytes in the full setting, which take seconds to put together.
        self._cut: dict[tuple[int, int | None], RankBatch] = {}
        self._whole: dict[int, list[dict[str, Any]]] = {}

    def cut_batch(self, pairs: int, budget: int | None) -> RankBatch:
        """As the loader cuts and prepares it: mini-batches of at most ``budget`` tokens, or one for each side."""
        if (pairs, budget) not in self._cut:
            self._cut[pairs, budget] = self._cut_batch(pairs, budget)
        return self._cut[pairs, budget]

    def whole_batch(self, pairs: int) -> list[dict[str, Any]]:
        """As sentence-transformers' collator has it: queries and pages, each in one piece."""
        if pairs not in self._whole:
            pages = self._merge([self._theirs[n % len(self._theirs)] for n in range(pairs)])
            self._whole[pairs] = [_pinned(self._model.preprocess(self.queries[:pairs])), _pinned(pages)]
        return self._whole[pairs]

    def _cut_batch(self, pairs: int, budget: int | None) -> RankBatch:
        cost_of_side = {
            "document": self.page_tokens_n[np.arange(pairs) % len(self._ours)],
            "query": np.array([len(query) // 4 + 16 for query in self.queries[:pairs]]),
        }
        mini_batches = []
        for side in SIDES:
            modality = "text" if side == "query" else "image"
            for rows in cut(cost_of_side[side], None, budget):
                if side == "document":
                    features = self._merge([self._ours[row % len(self._ours)] for row in rows])
                else:
                    features = self._preprocess([self.queries[row] for row in rows], side)
                mini_batches.append(MiniBatch(side, modality, rows, _pinned(features), len(rows)))
        # Every page has a hash of its own, or the same noise would be masked as a false negative.
        row_b, valid_b = np.arange(pairs, dtype=np.int64), np.ones(pairs, dtype=bool)
        return RankBatch(
            step=0,
            epoch=0,
            pairs_b=row_b,
            valid_b=valid_b,
            query_hash_b=row_b + pairs,
            page_hash_p=row_b,
            owner_p=row_b,
            page_valid_p=valid_b,
            teacher_p=np.full(pairs, np.nan, np.float32),
            answers_bm=row_b[:, None],
            mini_batches=tuple(mini_batches),
            quarantined=(),
            seconds_waited=0.0,
        )

    def forward_flops(self, config: Any, pairs: int) -> float:
        """Of one forward of all queries and pages without padding."""
        query_tokens = [_places(self._model.preprocess([query])) for query in self.queries[:pairs]]
        page_tokens = [int(self.page_tokens_n[n % len(self.page_tokens_n)]) for n in range(pairs)]
        patches = [self._patches_n[n % len(self._patches_n)] for n in range(pairs)]
        return forward_flops(config, [*query_tokens, *page_tokens], patches)


def forward_flops(config: Any, tokens: Sequence[int], patches: Sequence[int]) -> float:
    """Of one forward of some inputs without padding; the reference is torch's own counter.

    A multiplication and an addition are two. Attention counts in full where it is causal, as that counter does.

    Args:
        config: A Qwen3-VL's.
        tokens: Of each query and page, visual ones too.
        patches: Of each page.
    """
    text, vision = config.text_config, config.vision_config
    width, heads, pair_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    weights = text.num_hidden_layers * (
        width * text.head_dim * (2 * heads + 2 * pair_heads) + 3 * width * text.intermediate_size
    )
    squares = 4 * text.num_hidden_layers * heads * text.head_dim
    of_text = sum(2 * weights * n + squares * n**2 for n in tokens)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    of_a_patch = patch * vision.hidden_size + vision.depth * (
        4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    )
    merged = vision.hidden_size * vision.spatial_merge_size**2
    of_a_merger = (merged * merged + merged * vision.out_hidden_size) / vision.spatial_merge_size**2
    of_a_patch += of_a_merger * (1 + len(vision.deepstack_visual_indexes))
    of_pages = sum(2 * of_a_patch * n + 4 * vision.depth * vision.hidden_size * n**2 for n in patches)
    return float(of_text + of_pages)


def _pinned(features: Mapping[str, Any]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return dict(features)

    def pinned(value: Any) -> Any:
        if isinstance(value, PixelBytes):
            return PixelBytes(value.patch_PB.pin_memory(), value.normalisation)
        return value.pin_memory() if isinstance(value, Tensor) else value

    return {name: pinned(value) for name, value in features.items()}


def _places(features: Mapping[str, Any]) -> int:
    # Flash attention's features of text have no mask.
    mask = features.get("attention_mask")
    return int(features["input_ids"].numel() if mask is None else mask.sum())
