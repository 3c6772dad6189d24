"""What a rank's memory holds under each strategy, by part and by moment of a step.

    pass one     weights, their casts, a forward without graph, graphs that are kept
    loss         embeddings of all ranks, tiles of scores
    pass two     a mini-batch's graph and what its backward needs, gradients that add up
    reduction    gradients meet: whole ones, those of this rank, buckets on their way
    update       gradients and weights; torch's fused AdamW has no temporaries

A part is there at some of these. On a GPU the peak is the largest moment: torch's allocator uses a block again for
whatever fits. On a CPU it is more: glibc's malloc gives blocks of 32 MiB and more back to the system, but keeps smaller
ones in its heap, where larger ones find no place later. So small blocks count as if they were all there at once.

Where the sizes come from is said beside each; of DeepSpeed they were read in 0.19.8.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOMENTS = ("pass one", "loss", "pass two", "reduction", "update")
PARTS = (
    "weights",
    "gathered",
    "gradients",
    "optimizer",
    "buffers",
    "casts",
    "activations",
    "kept graphs",
    "embeddings",
    "image features",
    "loss tiles",
    "checkpoint copy",
    "frozen outputs",
    "pages",
    "process",
    "runtime",
)
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3 offload", "fsdp2")

# As the modules name them that hold such buffers; tests compare.
BUCKET_ELEMENTS_OF_DDP = 32 * 1024 * 1024
TILE_BYTES = 256 * 1024 * 1024
# stage3_max_live_parameters and stage3_max_reuse_distance of DeepSpeed, where its config does not set them.
LIVE_ELEMENTS_OF_ZERO3 = 1_000_000_000

# A CUDA context with cuBLAS's workspace, and NCCL's buffers where there are other ranks.
CUDA_CONTEXT_BYTES, NCCL_BYTES = 600 * 2**20, 400 * 2**20
# Python with torch, transformers, sentence-transformers and accelerate, measured with torch 2.15; and DeepSpeed.
PROCESS_BYTES, DEEPSPEED_BYTES = 1_035_000_000, 65_000_000
BYTES_SAVED_OF_A_PARAMETER = 12
"""In a checkpoint: a weight and two moments, fp32."""


@dataclass(frozen=True)
class Holding:
    """What is held, whatever the strategy does with it; bytes are of one rank.

    Attributes:
        parameters, trained: Elements.
        weight_bytes: Of all weights as single and ddp hold them, frozen ones perhaps in half precision; the others hold
            fp32.
        element_bytes: Of a trained weight.
        largest_trained: Elements of the largest trained parameter.
        small_trained: Elements of trained parameters that are small blocks.
        units: Elements that fsdp2 gathers together; the last one stays.
        cast_bytes: Copies of weights in half precision.
        forward_bytes, backward_bytes: Most that lives in a pass over a mini-batch.
        kept_bytes: Graphs that wait for pass two.
        embedding_bytes, tile_bytes: Of an embedder's loss.
        feature_bytes: Of a reranker's image features and their gradients.
        page_bytes: Features of a step in host memory, and those prepared ahead.
        frozen_bytes: Outputs of frozen parts in host memory.
    """

    parameters: int
    trained: int
    weight_bytes: int
    element_bytes: int
    largest_trained: int
    small_trained: int
    units: tuple[int, ...]
    cast_bytes: int
    forward_bytes: int
    backward_bytes: int
    kept_bytes: int
    embedding_bytes: int
    tile_bytes: int
    feature_bytes: int
    page_bytes: int
    frozen_bytes: int
    reduces_at_once: bool
    keeps_gathered: bool
    eight_bit: bool
    bucket_elements: int


@dataclass(frozen=True)
class Part:
    """Bytes of one thing, the moments in which it is there, and whether it is made of small blocks."""

    name: str
    bytes: int
    moments: tuple[str, ...] = MOMENTS
    is_small: bool = False


@dataclass(frozen=True)
class Memory:
    """Of one rank.

    Attributes:
        parts: On the device; on a CPU in the process.
        host: Beside a GPU, in the rank's share of host memory.
        total_bytes: The peak.
        moment: When it comes; on a CPU of the large blocks.
        keeps_small: Whether small blocks count at every moment.
    """

    parts: tuple[Part, ...]
    host: tuple[Part, ...]
    total_bytes: int
    moment: str
    keeps_small: bool

    def by_name(self) -> dict[str, int]:
        """Bytes of each part that counts in the total, those of one name together."""
        counted: dict[str, int] = {}
        for part in self.parts:
            if (part.is_small and self.keeps_small) or self.moment in part.moments:
                counted[part.name] = counted.get(part.name, 0) + part.bytes
        return counted

    def by_moment(self) -> dict[str, dict[str, int]]:
        """Bytes of each part at each moment."""
        table: dict[str, dict[str, int]] = {}
        for name in sorted((part.name for part in self.parts), key=PARTS.index):
            table[name] = {
                moment: sum(part.bytes for part in self.parts if part.name == name and moment in part.moments)
                for moment in MOMENTS
            }
        return table

    @property
    def host_bytes(self) -> int:
        return sum(part.bytes for part in self.host)


def memory_of(strategy: str, holding: Holding, ranks: int, ranks_of_copy: int, *, on_gpu: bool) -> Memory:
    """What a rank holds.

    Args:
        strategy: One of STRATEGIES.
        ranks_of_copy: Over how many fsdp2 spreads the model.
    """
    parts = [*_held_by(strategy, holding, ranks, ranks_of_copy), *_of_a_step(holding)]
    copy = Part("checkpoint copy", BYTES_SAVED_OF_A_PARAMETER * holding.trained // ranks, is_small=True)
    pages = Part("pages", holding.page_bytes, is_small=True)
    frozen = Part("frozen outputs", holding.frozen_bytes)
    process = PROCESS_BYTES + (DEEPSPEED_BYTES if strategy.startswith("zero") else 0)
    host = [Part("process", process), pages, copy, frozen]
    if not on_gpu:
        # What is offloaded lies where all the rest does.
        parts = [*parts, *host]
        small = sum(part.bytes for part in parts if part.is_small)
        large, moment = _largest_moment([part for part in parts if not part.is_small])
        return Memory(tuple(parts), (), small + large, moment, keeps_small=True)
    if strategy == "zero3 offload":
        host += [Part(part.name, part.bytes) for part in parts if part.name in ("weights", "optimizer")]
        parts = [part for part in parts if part.name not in ("weights", "optimizer")]
    parts.append(Part("runtime", CUDA_CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)))
    total, moment = _largest_moment(parts)
    return Memory(tuple(parts), tuple(host), total, moment, keeps_small=False)


def _largest_moment(parts: Iterable[Part]) -> tuple[int, str]:
    parts = list(parts)
    of_moment = {moment: sum(part.bytes for part in parts if moment in part.moments) for moment in MOMENTS}
    moment = max(MOMENTS, key=lambda name: of_moment[name])
    return of_moment[moment], moment


def _held_by(strategy: str, holding: Holding, ranks: int, ranks_of_copy: int) -> Iterator[Part]:
    """Weights, gradients, the optimizer's state and buffers."""
    if strategy.startswith("zero"):
        yield from _held_by_zero(strategy, holding, ranks)
    elif strategy == "fsdp2":
        yield from _held_by_fsdp2(holding, ranks_of_copy)
    else:
        yield from _held_whole(holding, ranks)


def _held_whole(holding: Holding, ranks: int) -> Iterator[Part]:
    small = _is_small(holding)
    gradients = holding.element_bytes * holding.trained
    yield Part("weights", holding.weight_bytes, is_small=small)
    yield Part("gradients", gradients, ("pass two", "reduction", "update"), is_small=small)
    yield Part("optimizer", holding.trained * (2 if holding.eight_bit else 2 * holding.element_bytes), is_small=small)
    if ranks > 1:
        bucket = min(holding.trained, BUCKET_ELEMENTS_OF_DDP + holding.largest_trained)
        yield Part("buffers", holding.element_bytes * bucket, ("reduction",))


def _held_by_zero(strategy: str, holding: Holding, ranks: int) -> Iterator[Part]:
    whole, own = 4 * holding.trained, 4 * holding.trained // ranks
    small = _is_small(holding)
    bucket = 4 * min(holding.trained, holding.bucket_elements)
    whole_in = ("pass two", "reduction")
    # fp32 weights that are updated, beside those that are computed with, and two moments.
    yield Part("optimizer", 3 * own)
    if strategy in ("zero1", "zero2"):
        yield Part("weights", 4 * holding.parameters)
        yield Part("gradients", own, ("reduction", "update"))
        if holding.reduces_at_once:
            yield Part("gradients", own, ("pass two",))
            yield Part("buffers", bucket, ("pass two", "reduction"))
        else:
            yield Part("gradients", whole, whole_in, is_small=small)
            yield Part("buffers", bucket, ("reduction",))
    else:
        yield Part("weights", 4 * holding.parameters // ranks)
        # Before they are laid end to end the partitions are small blocks, which nothing large can use later.
        yield Part("buffers", own, (), is_small=small)
        yield Part("gradients", own)  # a buffer that stays
        # As long as fewer elements live than it may keep, nothing that is gathered is given back before the step.
        live = holding.parameters if holding.keeps_gathered else min(holding.parameters, LIVE_ELEMENTS_OF_ZERO3)
        yield Part("gathered", 4 * live, ("pass one", "loss", "pass two", "reduction"), is_small=small)
        if not holding.reduces_at_once:
            yield Part("gradients", whole, whole_in, is_small=small)
        yield Part("buffers", bucket)
    yield Part("buffers", own, ("update",))  # a flat copy of the gradients


def _held_by_fsdp2(holding: Holding, ranks_of_copy: int) -> Iterator[Part]:
    small = _is_small(holding)
    whole, own = 4 * holding.trained, 4 * holding.trained // ranks_of_copy
    *blocks, rest = holding.units
    largest = sorted(blocks)[-2:]
    yield Part("weights", 4 * holding.parameters // ranks_of_copy, is_small=small)
    yield Part("optimizer", 2 * own, is_small=small)
    # The unit that computes, the next one, and what belongs to none, which stays through a pass.
    gathered = holding.parameters if holding.keeps_gathered else sum(largest) + rest
    yield Part("gathered", 4 * gathered, ("pass one", "loss", "pass two"), is_small=small)
    if holding.reduces_at_once:
        yield Part("gradients", own + 4 * sum(largest), ("pass two",), is_small=small)
    else:
        yield Part("gradients", whole, ("pass two", "reduction"), is_small=small)
        # A unit's gradients padded and laid side by side, twice, and the mean that comes back.
        yield Part("buffers", 2 * 4 * max(holding.units), ("reduction",))
    yield Part("gradients", own, ("reduction", "update"))


def _of_a_step(holding: Holding) -> Iterator[Part]:
    """What passes through, the same under every strategy."""
    yield Part("casts", holding.cast_bytes, ("pass one", "pass two"), is_small=True)
    activations = max(holding.forward_bytes, holding.backward_bytes)
    if activations:
        yield Part("activations", holding.forward_bytes, ("pass one",))
        yield Part("activations", holding.backward_bytes, ("pass two",))
    yield Part("kept graphs", holding.kept_bytes, ("pass one", "loss", "pass two"), is_small=True)
    yield Part("embeddings", holding.embedding_bytes, ("loss", "pass two"), is_small=True)
    yield Part("image features", holding.feature_bytes, ("pass one", "loss", "pass two", "reduction"), is_small=True)
    yield Part("loss tiles", holding.tile_bytes, ("loss",))


def _is_small(holding: Holding) -> bool:
    return 2 * holding.small_trained >= holding.trained


def checkpoint_bytes(trained: int) -> int:
    """What a checkpoint takes on the disk: a weight and two moments of each trained parameter, in fp32."""
    return BYTES_SAVED_OF_A_PARAMETER * trained


def bucket_elements(deepspeed: Mapping[str, Any]) -> int:
    """Of DeepSpeed's reduction, as its config file says."""
    return int(deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", 5e8))
