"""Bytes that a step sends, and seconds that it takes by a model which a plan prints beside them.

    compute     FLOPs of both passes over a share of the peak
    optimizer   a weight, a gradient and two moments read, all but the gradient written, over the memory's bandwidth
    network     what collectives bring to a rank, over a share of the slowest link on the way
    load        nothing: pages are decoded meanwhile, if there are workers enough (`farnear doctor` measures)

Sent bytes are counted as `metrics.jsonl` does: what a rank hands to each collective. On the way a gather brings W - 1
times as much, a reduction to all twice (W - 1) / W, one to owners (W - 1) / W.
"""

from dataclasses import dataclass

from farnear.gpus import Gpu
from farnear.launching.memory import Holding

UTILISATION = 0.4
"""Of the bf16 peak, assumed of both passes."""
LINK_SHARE = 0.7
"""Of a link's bandwidth that collectives reach, assumed."""
FP32_SHARE = 1 / 16
"""Of the bf16 peak that plain fp32 has, about."""
CPU_FLOPS_OF_A_CORE, CPU_MEMORY_BANDWIDTH, CPU_LINK = 20e9, 10e9, 2e9
"""Assumed of a CPU, reached and not peak."""
PCIE_BANDWIDTH, HOST_MEMORY_BANDWIDTH = 25e9, 50e9
"""Of a GPU to the host and of the host's memory, assumed; offload goes over both."""
DISK_BANDWIDTH = 1e9
"""Bytes a second that a node writes and syncs, assumed."""


@dataclass(frozen=True)
class Machine:
    """Where the run is to go.

    Attributes:
        gpu: None for a CPU.
        ranks_of_node: Equally many on each node.
        node_bandwidth: Bytes a second of each rank to other nodes.
        cores_of_rank: Of a CPU.
        is_this: Whether it is the machine that plans.
    """

    gpu: Gpu | None
    ranks_of_node: int
    nodes: int
    node_bandwidth: float
    cores_of_rank: int
    is_this: bool

    @property
    def ranks(self) -> int:
        return self.ranks_of_node * self.nodes

    @property
    def bandwidth_in_node(self) -> float:
        return CPU_LINK if self.gpu is None else self.gpu.link_bandwidth

    @property
    def ring_bandwidth(self) -> float:
        """Of a ring over all ranks, which enters and leaves each node once, over all of its cards together."""
        if self.nodes == 1:
            return self.bandwidth_in_node
        return min(self.bandwidth_in_node, self.node_bandwidth * self.ranks_of_node)

    @property
    def bandwidth_over_nodes(self) -> float:
        """Of a ring over one rank of each node, while the node's other ranks have rings of their own."""
        return min(self.bandwidth_in_node, self.node_bandwidth)

    def flops(self, *, half_precision: bool) -> float:
        """That a rank reaches, a second."""
        if self.gpu is None:
            return CPU_FLOPS_OF_A_CORE * self.cores_of_rank
        return self.gpu.bf16_flops * UTILISATION * (1.0 if half_precision else FP32_SHARE)


@dataclass(frozen=True)
class Work:
    """Of one rank in a step.

    Attributes:
        flops: Of both passes.
        gathered_elements: Parameters that are computed with, summed over all forwards and backwards.
        skipping_elements: Those that DeepSpeed fetches ahead in vain, where a text skips a tower that a page before it
            went through, summed likewise.
        reduced_elements: Gradients of all mini-batches, where each is reduced at once.
        shown_bytes: What the rank shows to all, beside what its strategy does.
        said_bytes: What it says about everyone's.
        groups: Kinds of mini-batches, whose numbers ranks tell each other where a forward is a collective.
    """

    flops: float
    gathered_elements: int
    skipping_elements: int
    reduced_elements: int
    shown_bytes: int
    said_bytes: int
    groups: int


@dataclass(frozen=True)
class Network:
    """Bytes of a step.

    Attributes:
        sent: What a rank hands to collectives, by what it is about.
        travelling: That reach it in rings over all ranks.
        within_node: In rings over the ranks of its node.
        over_nodes: In rings over one rank of each node.
    """

    sent: dict[str, int]
    travelling: float
    within_node: float = 0.0
    over_nodes: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    optimizer: float
    network: float

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.network


def network_of(strategy: str, holding: Holding, work: Work, ranks: int, ranks_of_copy: int) -> Network:
    """What the ranks tell each other in a step."""
    if ranks == 1:
        return Network({}, 0.0)
    shown, said = work.shown_bytes, work.said_bytes
    if strategy.startswith("zero3") or strategy == "fsdp2":
        shown += 8 * work.groups
    reduced = trained = holding.element_bytes * holding.trained
    whole = 4 * holding.parameters
    if holding.reduces_at_once:
        reduced = 4 * work.reduced_elements
    sent = {"exchange": shown + said}
    travelling = shown * (ranks - 1) + said * (ranks - 1) / ranks
    if strategy in ("single", "ddp"):
        sent["reductions"] = trained
        return Network(sent, travelling + 2 * trained * (ranks - 1) / ranks)
    if strategy in ("zero1", "zero2"):
        sent["reductions"], sent["parameter_gathers"] = reduced, trained // ranks
        return Network(sent, travelling + (reduced + trained) * (ranks - 1) / ranks)
    ahead = work.skipping_elements if strategy.startswith("zero") else 0
    gathers = whole if holding.keeps_gathered else 4 * (work.gathered_elements + ahead)
    spread_over = ranks if strategy.startswith("zero") else ranks_of_copy
    sent["reductions"], sent["parameter_gathers"] = reduced, gathers // spread_over
    among_owners = (reduced + gathers) * (spread_over - 1) / spread_over
    if spread_over == ranks:
        return Network(sent, travelling + among_owners)
    # A copy of the model on each node: only reduced shards go between nodes.
    copies = ranks // spread_over
    sent["reductions"] += reduced // spread_over
    over_nodes = 2 * reduced / spread_over * (copies - 1) / copies
    return Network(sent, travelling, within_node=among_owners, over_nodes=over_nodes)


def step_time(
    strategy: str, holding: Holding, work: Work, machine: Machine, network: Network, *, half_precision: bool
) -> StepTime:
    """Seconds of a step by the model in the module's text."""
    spread_over = 1 if strategy in ("single", "ddp") else machine.ranks
    state = 7 * holding.element_bytes * holding.trained / spread_over
    bandwidth = CPU_MEMORY_BANDWIDTH if machine.gpu is None else machine.gpu.memory_bandwidth
    if strategy == "zero3 offload" and machine.gpu is not None:
        own = 4 * holding.trained / spread_over
        # The host's memory is shared by the node's ranks; gradients go there and weights come back.
        optimizer = state * machine.ranks_of_node / HOST_MEMORY_BANDWIDTH + 2 * own / PCIE_BANDWIDTH
        optimizer += 4 * work.gathered_elements / machine.ranks / PCIE_BANDWIDTH
    else:
        optimizer = state / bandwidth
    return StepTime(
        compute=work.flops / machine.flops(half_precision=half_precision),
        optimizer=optimizer,
        network=(
            network.travelling / machine.ring_bandwidth
            + network.within_node / machine.bandwidth_in_node
            + network.over_nodes / machine.bandwidth_over_nodes
        )
        / LINK_SHARE,
    )


def save_seconds(saved_bytes: int) -> float:
    """Of a checkpoint, from the step that asks for it until it is published, at the assumed speed of one node's disk.

    A file is written, synced, and read once more for its hash, mostly from memory.
    """
    return saved_bytes / DISK_BANDWIDTH
