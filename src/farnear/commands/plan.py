"""`farnear plan`: what a run will take, from its run file alone."""

import argparse
import gc
import os
import sys

from farnear.command_line import Parser, add_run_arguments, positive
from farnear.errors import UserError


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
    add_run_arguments(parser, resumes=False)
    parser.add_argument(
        "--gpu", metavar="KIND", help="such as h100, a100-80, l4, or cpu (default: slurm.gpu_type, else this machine)"
    )
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, help="or processes on a CPU (default: 8)")
    parser.add_argument("--nodes", metavar="N", type=positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--pairs", metavar="N", type=positive, help="training pairs, where the shards are not here")
    parser.add_argument(
        "--node-bandwidth",
        metavar="GB/s",
        type=float,
        help="of each GPU to other nodes (default: 50)",
    )
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from farnear.config import load_config
    from farnear.environment import quiet_libraries
    from farnear.launching.planned_machine import NODE_BANDWIDTH, planned_machine
    from farnear.outcome import error_line

    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imports and traces make millions of objects that live until the end; to look through them again and again would
    # take a sixth of the time.
    gc.disable()
    config = load_config(arguments.run_file, arguments.overrides)
    machine = planned_machine(
        config,
        kind=arguments.gpu,
        ranks_of_node=arguments.gpus_per_node,
        nodes=arguments.nodes,
        node_bandwidth=NODE_BANDWIDTH if arguments.node_bandwidth is None else arguments.node_bandwidth * 1e9,
    )
    quiet_libraries()

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
