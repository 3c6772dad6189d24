"""The machine that a run is planned for: the one that somebody names, the cluster of section `slurm`, or this one."""

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.gpus import GPUS, gpu_by_name, gpu_of_device
from farnear.launching.hardware import read_hardware
from farnear.launching.step_time import Machine

NODE_BANDWIDTH = 50e9
"""Bytes a second of each GPU to other nodes where nobody says: 400 Gbit/s for each, as in usual clusters."""

_GPUS_OF_USUAL_NODE = 8


def planned_machine(
    config: RunConfig,
    *,
    kind: str | None,
    ranks_of_node: int | None,
    nodes: int = 1,
    node_bandwidth: float = NODE_BANDWIDTH,
) -> Machine:
    """What the run is to go on.

    Args:
        kind: Of its GPUs, or "cpu"; None takes the run file's `slurm.gpu_type`, and without that this machine.
        ranks_of_node: None follows from the run file, or from the hardware.

    Raises:
        UserError: The kind is not known, or the nodes cannot share the run file's ranks.
    """
    is_this = kind is None and config.slurm.gpu_type is None
    kind = kind or config.slurm.gpu_type
    hardware = read_hardware()
    if kind is not None and kind != "cpu":
        gpu, found = gpu_by_name(kind), _GPUS_OF_USUAL_NODE
        if gpu is None:
            raise UserError(f"GPU {kind} is not known; the kinds are cpu, {', '.join(one.name for one in GPUS)}")
    elif kind is None and hardware.gpus:
        gpu, found = gpu_of_device(hardware.gpus[0]), len(hardware.gpus)
        if gpu is None:
            raise UserError(
                f"the GPU here, {hardware.gpus[0]}, is not among those that are known; name one like it with --gpu: "
                f"{', '.join(one.name for one in GPUS)}"
            )
    else:
        gpu, found = None, hardware.cores
    of_node = ranks_of_node
    if config.strategy == "single":
        of_node = 1
    elif of_node is None and config.num_processes is not None:
        of_node, left = divmod(config.num_processes, nodes)
        if left or not of_node:
            raise UserError(
                f"num_processes is {config.num_processes}, which {nodes} nodes cannot share evenly; change one of them"
            )
    elif of_node is None and not is_this:
        of_node = config.slurm.ranks_per_node or config.slurm.gpus_per_node
    of_node = of_node or found
    return Machine(
        gpu=gpu,
        ranks_of_node=of_node,
        nodes=nodes,
        node_bandwidth=node_bandwidth,
        cores_of_rank=max(1, hardware.cores // of_node),
        is_this=is_this,
    )
