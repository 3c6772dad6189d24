"""Whether a page goes through a reranker's tower once for all the pairs that it stands in: tried, and agreed on."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from farnear.model.pairs import PairPicker, PairPreprocessing
from farnear.model.reranker import same_scores_shared
from farnear.parallel.collectives import exchange_ints
from farnear.parallel.world import World

_KINDS = {"text", "image", "image+text"}
# In half precision scores from shared features are rounded otherwise than those from pixels.
_TOLERANCE_IN_HALF = 3e-2


def settle_pages_once(
    forward: Callable[[dict[str, Any]], Tensor],
    preprocess: PairPreprocessing,
    pick: PairPicker | None,
    kinds: Collection[tuple[str, str]],
    world: World,
    *,
    half_precision: bool,
) -> PairPicker | None:
    """``pick`` where they do, else None; ``preprocess`` then prepares pairs likewise. A collective.

    Args:
        forward: In evaluation mode.
        pick: None where the model's structure forbids it (`farnear.model.reranker.shares_images`).
        kinds: Of the inputs that will come, each with its side.
    """
    if pick is not None and {kind for _, kind in kinds} <= _KINDS:
        tolerance = {"tolerance": _TOLERANCE_IN_HALF} if half_precision else {}
        same = same_scores_shared(forward, preprocess, pick, world.device, **tolerance)
        is_so = min(one for (one,) in exchange_ints([int(same)], world.device)) == 1
    else:
        is_so = False
    preprocess.shares_images = is_so
    return pick if is_so else None
