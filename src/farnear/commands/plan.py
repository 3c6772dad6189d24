"""`farnear plan`: what a run will take, from its run file alone."""

import argparse
import gc
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, positive
from farnear.errors import UserError

if TYPE_CHECKING:
    from farnear.config import RunConfig
    from farnear.launching.step_time import Machine

# GB a second of each rank to other nodes where nobody says: a network of 400 Gbit/s for each GPU, as in usual clusters.
NODE_BANDWIDTH = 50.0


def add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="what a run will take: memory, network, time, and what would go wrong",
        description="Compute from a run file, without a GPU, network or weights, what it takes on a machine: batch "
        "arithmetic, memory of a rank by part, bytes and seconds of a step, the largest mini-batch under each "
        "strategy. The model's config.json is taken from its folder, the hub's cache, or beside the run file. Exits "
        "with 2 where it foresees an error.",
        epilog="examples:\n"
        "  farnear plan run.yaml --gpu h100\n"
        "  farnear plan run.yaml strategy=zero3 --gpu a100-80 --nodes 4 --pairs 1000000",
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    parser.add_argument("--gpu", metavar="KIND", help="such as h100, a100-80, l4, or cpu (default: this machine)")
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, help="or processes on a CPU (default: 8)")
    parser.add_argument("--nodes", metavar="N", type=positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--pairs", metavar="N", type=positive, help="training pairs, where the shards are not here")
    parser.add_argument(
        "--node-bandwidth",
        metavar="GB/s",
        type=float,
        default=NODE_BANDWIDTH,
        help="of each GPU to other nodes (default: %(default)s)",
    )
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from farnear.config import load_config
    from farnear.outcome import error_line

    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imports and traces make millions of objects that live until the end; to look through them again and again would
    # take a sixth of the time.
    gc.disable()
    config = load_config(arguments.run_file, arguments.overrides)
    machine = _machine(arguments, config)

    from transformers.utils import logging

    # What libraries say about their own future and about configs is for a run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()

    from farnear.launching.forecast import forecast
    from farnear.launching.foresee import foreseen
    from farnear.launching.plan_text import plan_lines

    planned = forecast(config, arguments.run_file, machine, arguments.pairs)
    for line in plan_lines(planned):
        print(line)
    sys.stdout.flush()
    errors, _ = foreseen(planned)
    for error in errors:
        print(error_line(UserError(error)), file=sys.stderr)
    return UserError.exit_code if errors else 0


def _machine(arguments: argparse.Namespace, config: "RunConfig") -> "Machine":
    """The one that is named, or this one as `farnear launch` would use it."""
    import torch

    from farnear.gpus import GPUS, gpu_by_name, gpu_of_device
    from farnear.launching.step_time import Machine

    cores = len(os.sched_getaffinity(0))
    named = arguments.gpu
    if named in (None, "cpu"):
        visible = 0 if named == "cpu" else torch.cuda.device_count()
        gpu = gpu_of_device(torch.cuda.get_device_name(0)) if visible else None
        if visible and gpu is None:
            raise UserError(
                f"the GPU here, {torch.cuda.get_device_name(0)}, is not among those that are known; name one like it "
                f"with --gpu: {', '.join(one.name for one in GPUS)}"
            )
        of_node = arguments.gpus_per_node or visible or cores
    else:
        gpu, of_node = gpu_by_name(named), arguments.gpus_per_node or 8
        if gpu is None:
            raise UserError(f"--gpu {named} is not known; the kinds are cpu, {', '.join(one.name for one in GPUS)}")
    if config.strategy == "single":
        of_node = 1
    elif config.num_processes is not None and arguments.gpus_per_node is None:
        if config.num_processes % arguments.nodes:
            raise UserError(
                f"num_processes is {config.num_processes}, which {arguments.nodes} nodes cannot share evenly; say "
                "--gpus-per-node, or change --nodes"
            )
        of_node = config.num_processes // arguments.nodes
    return Machine(
        gpu=gpu,
        ranks_of_node=of_node,
        nodes=arguments.nodes,
        node_bandwidth=arguments.node_bandwidth * 1e9,
        cores_of_rank=max(1, cores // of_node),
        is_this=named is None,
    )
