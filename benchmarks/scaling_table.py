"""What a step would cost on clusters that nobody measured, up to 1,024 GPUs: computed for docs/scaling.md.

What is sent stands in `scaling_least.py`, together with what farnear sends beyond the least, which is reckoned with
here, but for what zero3 gathers in vain: a bucket at most at each change.

How long: bytes over the bandwidth of the slowest link of the ring, plus the hops of one small message through it for
every collective. A ring over several nodes enters and leaves each of them once, over all its network cards together. An
all-gather or reduce-scatter hops W - 1 times; an all-reduce goes up and down a tree of nodes, as NCCL does it. Nothing
is taken to overlap with computing, which makes fsdp2, whose gathers run ahead, look worse than it is.

zero3 gathers module by module while DeepSpeed learns in which order they come, and in buckets ahead of their use once
it knows. It learns anew, in two rounds, whenever the mini-batches change from pages to queries or from pass one to pass
two.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gpu_inputs import forward_flops
from gpu_step import TEXT_2B, VISION_2B
from scaling_least import FP32, Passes, Weights, least_exchange, least_update, reducing
from transformers import AutoModel, Qwen3VLConfig

from farnear.loss.contrastive import TILE_BYTES
from farnear.parallel.replicated import BUCKET_ELEMENTS

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
FIXED_PAIRS = 8192
PAIRS_PER_RANK = 64
LARGEST_BATCH = 2**20
BEARABLE_SHARE = 0.1
STRATEGIES = (
    "ddp",
    "zero1, zero2",
    "zero3",
    "zero3, reshard: step",
    "fsdp2",
    "fsdp2, reshard: step",
    "fsdp2, shard_within: node",
    "fsdp2, both",
)

# What a step computes: pages of 600 x 600 pixels (360,000, as in the example), queries of 40 tokens.
PATCHES_PER_PAGE = (600 // 32 * 2) ** 2
TOKENS_PER_PAGE = PATCHES_PER_PAGE // 4 + 20
TOKENS_PER_QUERY = 40
PAGES_PER_MINI_BATCH = 8
QUERIES_PER_MINI_BATCH = 32
TOGETHER = 4
UTILISATION = 0.4

# Elements of a bucket in ds_configs/, and its bound below which a parameter stays on every rank.
DEEPSPEED_BUCKET_ELEMENTS = 50_000_000
DEEPSPEED_PERSISTENT_ELEMENTS = 100_000


@dataclass(frozen=True)
class Sent:
    """What each rank sends of one kind.

    Attributes:
        wire_bytes: As a mean over ranks.
        calls: Collectives.
        is_tree: Whether a small message goes through a tree (all-reduce), else round a ring.
    """

    wire_bytes: float
    calls: int
    is_tree: bool = False


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs.

    Attributes:
        inside: Bytes a second of a GPU to others of its node, each way.
        between: Bytes a second of a node to others, each way.
        hop_inside, hop_between: Seconds for a message of a few bytes.
        flops_half, flops_single: Of a GPU, dense bf16 and fp32.
    """

    name: str
    inside: float
    between: float
    hop_inside: float
    hop_between: float
    flops_half: float
    flops_single: float
    gpus_per_node: int = 8

    def seconds(self, sent: Sent, ranks: int) -> float:
        """Of a ring, or tree, over the first so many GPUs."""
        nodes = -(-ranks // self.gpus_per_node)
        per_node = min(ranks, self.gpus_per_node)
        bandwidth = self.inside if nodes == 1 else min(self.inside, self.between)
        hops = (nodes - 1) * self.hop_between + (ranks - nodes) * self.hop_inside
        if sent.is_tree:
            hops = 2 * (math.ceil(math.log2(nodes)) * self.hop_between + (per_node - 1) * self.hop_inside)
        return sent.wire_bytes / bandwidth + sent.calls * hops

    def seconds_over_nodes(self, sent: Sent, nodes: int) -> float:
        """Of a tree over one GPU of each node, while the node's other GPUs do the same."""
        hops = 2 * math.ceil(math.log2(nodes)) * self.hop_between
        return sent.wire_bytes * self.gpus_per_node / self.between + sent.calls * hops


H100 = Cluster("8 H100 a node, NVLink, 400 Gb/s a GPU", 450e9, 8 * 50e9, 2e-6, 6e-6, 989e12, 67e12)
A100 = Cluster("8 A100 a node, PCIe, 100 Gb/s a node", 25e9, 12.5e9, 5e-6, 20e-6, 312e12, 19.5e12)
CLUSTERS = (H100, A100)


@cache
def model_2b() -> tuple[Weights, Weights]:
    """Qwen3-VL-Embedding-2B: its elements, and its modules of more than a few weights, each of which ZeRO-3 gathers."""
    with torch.device("meta"):
        towers = AutoModel.from_config(_config_2b(), dtype=torch.float32)
    elements, modules = dict.fromkeys(Weights.__annotations__, 0), dict.fromkeys(Weights.__annotations__, 0)
    for name, module in towers.named_modules():
        part = "vision" if "visual" in name else "text"
        where = "blocks" if ".blocks." in name or ".layers." in name else "rest"
        own = [parameter.numel() for parameter in module.parameters(recurse=False)]
        elements[f"{part}_{where}"] += sum(own)
        modules[f"{part}_{where}"] += any(size > DEEPSPEED_PERSISTENT_ELEMENTS for size in own)
    return Weights(**elements), Weights(**modules)


def units_2b() -> int:
    """FSDP2's: the blocks, and the rest."""
    return TEXT_2B["num_hidden_layers"] + VISION_2B["depth"] + 1


def compute_seconds(pairs: int, documents: int, cluster: Cluster) -> float:
    """Four forwards' worth of a rank's pairs, and three products of its rows with all columns."""
    tokens = [TOKENS_PER_QUERY, TOKENS_PER_PAGE]
    forward = forward_flops(_config_2b(), tokens, [PATCHES_PER_PAGE])
    loss = 6 * pairs * documents * TEXT_2B["hidden_size"]
    return (4 * pairs * forward / cluster.flops_half + loss / cluster.flops_single) / UTILISATION


def exchange_seconds(pairs: int, ranks: int, cluster: Cluster) -> float:
    """Three collectives."""
    return cluster.seconds(Sent(least_exchange(pairs, TEXT_2B["hidden_size"], ranks), 3), ranks)


def strategy_seconds(strategy: str, pairs: int, ranks: int, cluster: Cluster) -> float:
    """What a strategy sends beside the exchange: update and gathers."""
    elements, modules = model_2b()
    pages = Passes(-(-pairs // PAGES_PER_MINI_BATCH), together=TOGETHER)
    queries = Passes(-(-pairs // QUERIES_PER_MINI_BATCH), together=TOGETHER)
    trained = elements.of_page
    deepspeed_buckets = -(-trained // DEEPSPEED_BUCKET_ELEMENTS)
    if strategy == "ddp":
        sent = Sent(least_update("ddp", trained, ranks), -(-trained // BUCKET_ELEMENTS), is_tree=True)
        return cluster.seconds(sent, ranks)
    if strategy == "zero1, zero2":
        reduced = Sent(2 * reducing(FP32 * trained, ranks), deepspeed_buckets, is_tree=True)
        weights = Sent(reducing(FP32 * trained, ranks), deepspeed_buckets)
        return cluster.seconds(reduced, ranks) + cluster.seconds(weights, ranks)
    is_zero3, is_once = strategy.startswith("zero3"), strategy.endswith(("step", "both"))
    ranks_of_copy = min(ranks, cluster.gpus_per_node) if strategy.endswith(("node", "both")) else ranks
    if is_zero3:
        reductions = deepspeed_buckets
        gathered, calls = elements.gathered(pages, queries), _gathers_of_zero3(pages, queries)
    else:
        reductions = units_2b()
        text, vision = TEXT_2B["num_hidden_layers"], VISION_2B["depth"]
        gathered = elements.gathered_by_fsdp2(pages, queries)
        calls = Weights(text, vision, 1, 0).gathered_by_fsdp2(pages, queries)
    if is_once:
        gathered, calls = trained, modules.of_page if is_zero3 else reductions
    gathers = Sent(reducing(FP32 * gathered, ranks_of_copy), calls)
    scattered = Sent(reducing(FP32 * trained, ranks_of_copy), reductions)
    seconds = cluster.seconds(gathers, ranks_of_copy) + cluster.seconds(scattered, ranks_of_copy)
    nodes = ranks // ranks_of_copy
    if nodes > 1:
        over_nodes = Sent(2 * reducing(FP32 * trained / ranks_of_copy, nodes), reductions, is_tree=True)
        seconds += cluster.seconds_over_nodes(over_nodes, nodes)
    return seconds


def _gathers_of_zero3(pages: Passes, queries: Passes) -> int:
    elements, modules = model_2b()
    calls = 0
    for side, alone, whole in (
        (pages, modules.of_page, elements.of_page),
        (queries, modules.of_query, elements.of_query),
    ):
        known = side.forwards + side.backwards - side.learning
        calls += side.learning * alone + known * -(-whole // DEEPSPEED_BUCKET_ELEMENTS)
    return calls


def shares(pairs: int, ranks: int, cluster: Cluster) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """(seconds of computing, seconds of the exchange, a strategy's seconds of talking in all and their share)."""
    computing = compute_seconds(pairs, pairs * ranks, cluster)
    exchange = exchange_seconds(pairs, ranks, cluster)
    talking = {name: exchange + strategy_seconds(name, pairs, ranks, cluster) for name in STRATEGIES}
    return computing, exchange, {name: (spent, spent / (spent + computing)) for name, spent in talking.items()}


def computed_tables() -> str:
    """Markdown."""
    parts = [_stated()]
    for cluster in CLUSTERS:
        for name, pairs_of in CASES.items():
            parts.append(f"### Computed: {cluster.name}, {name}\n\n{_seconds_table(cluster, pairs_of)}")
    parts.append(_reach_table())
    parts.append(_memory_table())
    return "\n\n".join(parts) + "\n"


def _weak(ranks: int) -> int:
    return PAIRS_PER_RANK


def _fixed(ranks: int) -> int:
    return FIXED_PAIRS // ranks


CASES = {f"{PAIRS_PER_RANK} pairs a GPU": _weak, f"a global batch of {FIXED_PAIRS:,}": _fixed}


def _stated() -> str:
    elements, _ = model_2b()
    flops = forward_flops(_config_2b(), [TOKENS_PER_QUERY, TOKENS_PER_PAGE], [PATCHES_PER_PAGE])
    lines = [
        "### Computed: what goes in\n",
        f"- model: Qwen3-VL-Embedding-2B, {elements.of_page:,} trained parameters, {TEXT_2B['hidden_size']} dims, fp32 "
        "weights and gradients, bf16 compute",
        f"- a pair: a page of {PATCHES_PER_PAGE:,} patches and {TOKENS_PER_PAGE} tokens, a query of {TOKENS_PER_QUERY} "
        f"tokens; {flops / 1e12:.2f} TFLOP a forward; no hard negatives",
        f"- mini-batches of {PAGES_PER_MINI_BATCH} pages and of {QUERIES_PER_MINI_BATCH} queries, {TOGETHER} of them "
        f"together in pass one, no graphs kept; {UTILISATION:.0%} of the peak (assumed, not measured)",
    ]
    for c in CLUSTERS:
        lines.append(
            f"- {c.name}: {c.inside / 1e9:g} GB/s a GPU inside the node and {c.between / 1e9:g} GB/s a node to others, "
            f"each way; {c.hop_inside * 1e6:g} and {c.hop_between * 1e6:g} microseconds a hop; "
            f"{c.flops_half / 1e12:g} TFLOP/s bf16, {c.flops_single / 1e12:g} fp32"
        )
    return "\n".join(lines)


def _seconds_table(cluster: Cluster, pairs_of: Callable[[int], int]) -> str:
    rows = []
    for ranks in GPUS:
        pairs = pairs_of(ranks)
        computing, exchange, talking = shares(pairs, ranks, cluster)
        cells = [f"{spent:.3g} ({share:.0%})" for spent, share in talking.values()]
        rows.append([f"{ranks:,}", f"{pairs * ranks:,}", f"{computing:.3g}", f"{exchange * 1e3:.2g}", *cells])
    return markdown(["GPUs", "G", "computing s", "exchange ms", *(f"{name} s" for name in STRATEGIES)], rows)


def _reach_table() -> str:
    """The largest number of GPUs at which talking is a bearable share."""
    columns = [(cluster, name) for cluster in CLUSTERS for name in CASES]
    rows = []
    for strategy in STRATEGIES:
        reach = []
        for cluster, name in columns:
            fit = [w for w in GPUS if shares(CASES[name](w), w, cluster)[2][strategy][1] <= BEARABLE_SHARE]
            reach.append(f"{max(fit):,}" if fit else "none")
        rows.append([strategy, *reach])
    heads = [f"{cluster.name.split(' a node')[0]}, {name}" for cluster, name in columns]
    title = f"### Computed: the most GPUs with communication at {BEARABLE_SHARE:.0%} of a step or less\n\n"
    return title + markdown(["strategy", *heads], rows)


def _memory_table() -> str:
    """All columns, their gradient, and the latter once more as it is sent; a tile; norms and keys are small."""
    rows = []
    for pairs in (*(PAIRS_PER_RANK * ranks for ranks in GPUS), LARGEST_BATCH):
        gathered = FP32 * pairs * TEXT_2B["hidden_size"]
        rows.append([f"{pairs:,}", f"{gathered / 1e9:.3f}", f"{(3 * gathered + TILE_BYTES) / 1e9:.2f}"])
    heads = ["G = N", "gathered [N, D] GB", "most that the loss holds GB"]
    return "### Computed: memory of the loss on each GPU\n\n" + markdown(heads, rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _config_2b() -> Any:
    return Qwen3VLConfig(text_config=dict(TEXT_2B), vision_config=dict(VISION_2B))
