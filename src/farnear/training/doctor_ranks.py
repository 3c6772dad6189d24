"""What `farnear doctor` has its ranks do: meet, talk as fast as they can, compare gradients, decode.

One launch does all of it, since starting ranks and importing takes longer than any of the measurements. Ranks meet
before they import anything heavy, so that a firewall is told within the time that it may take.

Rank 0 leaves what it found in a file, a JSON object a line: the name of what begins (``{"begins": "bandwidth"}``), then
its figures. What a rank cannot survive ends the launch as in a training; the last line then says in what.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.outcome import tell
from farnear.parallel.bandwidth import measure_bandwidth
from farnear.parallel.collectives import agree_on_max
from farnear.parallel.world import World, check_launch, join_world, on_main_rank, stop_world
from farnear.parallel.zero import deepspeed_config

PLANS = "plans"
WHO_MEETS = (
    "the usual cause is a firewall, or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME with an interface that is not there: "
    "compare them with `ip address`, open the ports between the hosts, or give the ranks longer with --timeout"
)


def examine(config: RunConfig | None, wanted: Sequence[str], folder: Path, seconds: float) -> None:
    """Measure what is ``wanted`` of bandwidth, gradient and decode. A collective.

    Args:
        config: The run, without which only the bandwidth can be measured.
        folder: An empty folder of all ranks; the figures come into its ``found.jsonl``.
        seconds: That meeting may take, and each exchange; the gradient has ten times as long.

    Raises:
        UserError: Naming what went wrong and what to do.
    """
    found = folder / "found.jsonl"
    is_main = os.environ.get("RANK", "0") == "0"

    def begin(check: str) -> None:
        if is_main:
            _append(found, {"begins": check})

    def note(check: str, figures: Mapping[str, Any]) -> None:
        if is_main:
            _append(found, {"check": check, **figures})

    begin("launch")
    if config is not None:
        check_launch(config, os.environ)
        if config.strategy.startswith("zero"):
            deepspeed_config(config, int(os.environ["WORLD_SIZE"]))
    started = perf_counter()
    world = _meet(seconds)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    note("launch", {"ranks": world.world_size, "backend": backend, "seconds": perf_counter() - started})
    if "bandwidth" in wanted and world.world_size > 1:
        begin("bandwidth")
        with _within(seconds, f"an all-reduce over {backend} took longer than {seconds:.0f} s; {WHO_MEETS}"):
            note("bandwidth", asdict(measure_bandwidth(world)))
    if config is not None and {"gradient", "decode"} & set(wanted):
        _with_data(config, wanted, folder / PLANS, world, begin, note, seconds=10 * seconds)
    stop_world()


def _with_data(
    config: RunConfig, wanted: Sequence[str], plans: Path, world: World, begin: Any, note: Any, *, seconds: float
) -> None:
    begin("gradient" if "gradient" in wanted else "decode")
    late = f"model, pairs and gradients took longer than {seconds:.0f} s; give them longer with --timeout"
    with _within(seconds, late):
        # Now, and not where the ranks have still to meet.
        from farnear.training.gradient_check import check_gradient, measure_decoding
        from farnear.training.shards import open_data

        without_evaluation = config.data.model_copy(update={"eval": (), "eval_corpus": ()})
        data = open_data(without_evaluation, config.evaluation, world)
        if "gradient" in wanted:
            note("gradient", asdict(check_gradient(config, data, world, plans)))
        if "decode" in wanted:
            begin("decode")
            # Alone, while the others wait: it is what one core does.
            note("decode", on_main_rank(world, lambda: measure_decoding(config, data, plans)))


def _meet(seconds: float) -> World:
    # torch's own limit says how many came; the other is for where it does not hold.
    with _within(seconds + 10, f"the ranks did not all meet within {seconds:.0f} s; {WHO_MEETS}"):
        try:
            world = join_world(patience=timedelta(seconds=seconds))
            agree_on_max([0], world.device)  # connections are made by the first exchange
        except UserError:
            raise
        except Exception as error:  # torch has a type for each way to fail, and most of them are RuntimeErrors
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"the ranks cannot meet ({type(error).__name__}: {reason}); {WHO_MEETS}") from error
    return world


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End this process with a line that says what took too long: nothing gets a thread out of a collective."""

    def end() -> None:
        tell(UserError(what))
        os._exit(UserError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
