"""Who this process is among its ranks, and whether the launcher started what the run file asks for.

accelerate and torchrun tell a process its place through the environment. Three of their habits turn a wrong start into
a wrong training without a word, so all three are checked here before the first collective:

- ``accelerate launch --cpu`` starts one process however many were asked for;
- a DeepSpeed config is dropped on a machine without GPUs, so that a ZeRO run trains something else;
- values in a config file (mixed precision, clipping, accumulation) override or shadow the training's own.

The run file decides. What contradicts it is a ``UserError`` that names both sides.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from farnear.config import RunConfig
from farnear.errors import UserError, refused_by_system
from farnear.parallel.traffic import Traffic, count_in

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one that indexes shards, loads a model or searches."""


@dataclass(frozen=True)
class World:
    """This process among its ranks.

    Attributes:
        rank: 0 to world_size - 1 over all nodes.
        world_size: Number of ranks.
        device: Where this rank computes.
        traffic: Counts this rank's collectives.
        control: All ranks once more, over gloo, for waits that may be long: while one rank searches, or to agree on
            stopping. None stands for the default group.
        saving: The same for the thread that publishes checkpoints while others train.
    """

    rank: int
    world_size: int
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    control: dist.ProcessGroup | None = field(default=None, compare=False)
    saving: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and speaks."""
        return self.rank == 0


def start_world(config: RunConfig, environment: Mapping[str, str] = os.environ) -> World:
    """Check the launch against the run file, join the process group and pick the device.

    Raises:
        UserError: The launcher's processes or config file contradict the run file.
    """
    check_launch(config, environment)
    return join_world(environment)


def join_world(environment: Mapping[str, str] = os.environ, patience: timedelta = PATIENCE) -> World:
    """Join the process group that the launcher's environment names, if it names one, and pick the device.

    Args:
        patience: How long ranks wait for each other, now and later.
    """
    rank = int(environment.get("RANK", 0))
    world_size = int(environment.get("WORLD_SIZE", 1))
    device = _pick_device(int(environment.get("LOCAL_RANK", 0)))
    control: Any = None
    saving: Any = None
    if "WORLD_SIZE" in environment:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=patience)
        if world_size > 1:
            control, saving = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
    world = World(rank, world_size, device, control=control, saving=saving)
    count_in(world.traffic)
    return world


def tighten(world: World, timeout: timedelta) -> None:
    """From now on no rank waits longer than this in a collective of the training.

    Groups of their own (control, saving) keep their patience: there one rank may work while the others wait.
    """
    if world.world_size == 1:
        return
    patient = {world.control, world.saving}
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in patient:
            # The second is the older name.
            set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
            set_timeout(timeout, group)


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_launch(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Compare what the launcher's environment tells with the run file.

    Raises:
        UserError: Naming the value of each side and how to make them agree.
    """
    started = environment.get("WORLD_SIZE")
    example = f"accelerate launch --config_file accelerate_configs/{config.strategy}.yaml launch/train.py RUN.yaml"
    if config.strategy == "single":
        if started not in (None, "1"):
            raise UserError(
                f"strategy single is one process, but the launcher started {started}; set strategy=ddp or start one"
            )
        return
    if started is None:
        raise UserError(
            f"strategy {config.strategy} needs ranks, but this process was started alone (accelerate does that under "
            f"--cpu and MULTI_CPU); start it with: {example}, or set strategy=single"
        )
    if config.num_processes is not None and int(started) != config.num_processes:
        raise UserError(
            f"the run file asks for num_processes={config.num_processes}, but the launcher started {started}; "
            f"pass --num_processes {config.num_processes} to the launcher or set num_processes={started}"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    with_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    is_zero = config.strategy.startswith("zero")
    if by_accelerate and with_deepspeed != is_zero:
        kind = "with DeepSpeed" if with_deepspeed else "without DeepSpeed"
        raise UserError(
            f"the run file says strategy={config.strategy}, but the accelerate config starts {kind}; "
            f"use --config_file accelerate_configs/{config.strategy}.yaml, or change the strategy"
        )
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        asked = "accelerate's own FSDP" if config.strategy == "fsdp2" else "FSDP"
        raise UserError(
            f"the accelerate config asks for {asked}, but the run file says strategy={config.strategy}; "
            f"use --config_file accelerate_configs/{config.strategy}.yaml"
        )
    _check_values(config, environment)


def tells_of_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone, or has not come for too long."""
    kinds = (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def on_main_rank(world: World, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run ``work`` on rank 0 and give its result, or its error, to every rank.

    Args:
        group: Of all ranks; the world's `control` if none is given.

    Raises:
        UserError: On all ranks alike: the one that ``work`` raised, or one for a file that it could not read or write.
        RuntimeError: On the other ranks, when ``work`` failed otherwise on rank 0.
    """
    told: list[Any] = [None, None]
    defect: Exception | None = None
    if world.is_main:
        try:
            told[0] = work()
        except UserError as error:
            told[1] = error
        except OSError as error:
            told[1] = refused_by_system(error)
        except Exception as error:
            told[1], defect = RuntimeError(f"rank 0 failed: {error!r}"), error
    if world.world_size > 1:
        dist.broadcast_object_list(told, src=0, group=group or world.control)
    if defect is not None:
        raise defect
    result, mistake = told
    if mistake is not None:
        raise mistake
    return result


def _check_values(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Values of an accelerate config that only shadow the run file's."""
    training = config.training
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    if precision not in ("no", own):
        raise UserError(
            f"the accelerate config says mixed_precision: {precision}, but the run file training.bf16: "
            f"{str(training.bf16).lower()} and training.fp16: {str(training.fp16).lower()}; take mixed_precision out "
            "of the accelerate config"
        )
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto", "None", ""):
        raise UserError(
            f"the accelerate config says gradient_accumulation_steps: {accumulation}, but a contrastive batch is not "
            "accumulated; take it out and set training.global_batch_size to the pairs of one step"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clipping not in ("auto", "None", "") and float(clipping) != training.max_grad_norm:
        raise UserError(
            f"the accelerate config says gradient_clipping: {clipping}, but the run file training.max_grad_norm: "
            f"{training.max_grad_norm}; take gradient_clipping out of the accelerate config"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file_given = bool(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    if config.strategy.startswith("zero") and not file_given and stage not in (None, config.strategy[-1]):
        raise UserError(
            f"the accelerate config says zero_stage: {stage}, but the run file strategy={config.strategy}; "
            f"use --config_file accelerate_configs/{config.strategy}.yaml"
        )


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this node has no GPU: {torch.cuda.device_count()} visible; "
            f"pass --num_processes {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
