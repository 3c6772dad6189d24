"""Strategies zero1, zero2, zero3: DeepSpeed's engine, driven for a gradient cache.

The engine is called directly, not through accelerate (whose ``backward`` also steps, and whose ``no_sync`` does nothing
from stage 2 on). ``engine.coalesce_grad_reduction()`` keeps the gradients of all mini-batches on the rank and reduces
them once when it ends; without it several ``engine.backward`` calls a step keep only the last one's gradient.

Under ``reduce: mini_batch`` DeepSpeed reduces within every backward and keeps the sum in the partitions until the step
(``managed_gradient_accumulation: false``, in which it asks for no last mini-batch). It reduces in the order in which
gradients appear, so ranks must then run the same modules: the cached step sees to that where a forward is a collective.

Under ``reshard: step`` ZeRO-3 keeps what it has gathered until the step: a step of eight mini-batches, half of them
through both towers and four of them with kept graphs, then gathers its parameters once instead of 15.1 times.

Four things the engine leaves to its caller, done here:

- a parameter without a gradient would keep the previous step's in its reduction buffer (ZeRO-3) or stop the flush
  (ZeRO-1, 2), so zeros are filled in first, by agreement of all ranks;
- under ``reduce: mini_batch`` ZeRO-3 adds a step's gradients to the previous step's, and a backward that follows
  another without a forward in between replaces what was there;
- a step with a non-finite gradient is dropped without a word, so `step` asks whether it was applied;
- clipping is 1.0 unless set, so it always is.

bf16 needs nothing here: the module itself computes in bf16 (`farnear.model.embedder`), and DeepSpeed sees fp32
parameters and fp32 gradients. Its own bf16 mode would accumulate the mini-batches in bf16.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.noise import sweep
from farnear.parallel.collectives import agree_on_max
from farnear.parallel.loading import is_on_main_rank_only, partition_one_by_one, send_buffers
from farnear.parallel.strategy import Features, LossScale, NonFiniteGradientError, ParameterSlice, adam_state
from farnear.parallel.world import World
from farnear.resources import resource

# Values with which a DeepSpeed config leaves a decision to the run file.
LEFT_OPEN = (None, "auto")
# Stands among the modules that use a parameter while it is to stay gathered.
THE_STEP = "the step"


class Zero:
    """A module whose optimizer state (1), gradients (2) and parameters (3) are spread over the ranks."""

    loss_scale: LossScale | None = None

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError:
            raise UserError(
                f"strategy {config.strategy} needs DeepSpeed, which is not installed here; "
                "pip install deepspeed, or set strategy=ddp"
            ) from None
        # An operator of its CPU inference that DeepSpeed would compile at start, with a compiler and minutes to spare.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        sweep()
        # It warns of an optimizer other than its own, which is what we bring on purpose.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._world = world
        self._stage = int(config.strategy[-1])
        self._reduces_at_once = config.training.reduce == "mini_batch"
        self.forward_is_collective = self._stage == 3 or self._reduces_at_once
        settings = deepspeed_config(config, world.world_size)
        if self._stage == 3 and is_on_main_rank_only(module, world):
            partition_one_by_one(module, settings, world)
            send_buffers(module, world)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        if self._engine.zero_optimization_stage() != self._stage:
            raise RuntimeError(f"DeepSpeed runs stage {self._engine.zero_optimization_stage()}, not {self._stage}")
        if self._reduces_at_once and not hasattr(self._engine, "managed_gradient_accumulation"):
            raise UserError(
                f"training.reduce: mini_batch needs a newer DeepSpeed than {deepspeed.__version__}, such as 0.19.8; "
                "pip install --upgrade deepspeed, or take it out"
            )
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._keeps_gathered = config.training.reshard == "step"

    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""
        if self._keeps_gathered:
            # A parameter that some module is using is not given back until the step. DeepSpeed's own way, persistence
            # thresholds, holds only while every forward is like the one before, which a cached step's are not.
            for parameter in self._engine.module.parameters():
                parameter.ds_active_sub_modules.add(THE_STEP)
        return self._engine(features)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backwards inside add up; at the end their averages over ranks stand in the partitions."""
        if self._reduces_at_once:
            if self._stage == 3:
                self._forget_gradients_of_last_step()
            yield
            return
        with self._engine.coalesce_grad_reduction():
            yield
            self._let_go()
            self._fill_missing_gradients()

    def backward(self, surrogate: Tensor) -> None:
        """Backward of a scalar, unscaled: the surrogate carries the final gradient already."""
        if self._reduces_at_once and self._stage == 3:
            # A forward does this; kept graphs are run backward without one in between.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(surrogate, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, gradient_scale: float = 1.0) -> float:
        """Clip, update and clear; see `Strategy.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed would also multiply surrogates by it, so it stands there only while gradients are divided.
        self._engine.optimizer.loss_scale = gradient_scale
        self._engine.step()
        self._engine.optimizer.loss_scale = 1.0
        if not self._engine.was_step_applied():
            raise NonFiniteGradientError
        return float(self._engine.get_global_grad_norm())

    def train(self, mode: bool) -> None:
        """Training mode (dropout) or evaluation mode."""
        self._engine.train(mode)

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """This rank's partition. ZeRO's partitions are disjoint, so ``owned`` changes nothing."""
        del owned
        pieces = self._slices_of_stage_3() if self._stage == 3 else self._slices_of_stage_1_and_2()
        return list(pieces)

    def spread_weights(self) -> None:
        """From the optimizer's partitions to the parameters, as in an engine's step."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        # Small parameters stay gathered between forwards; without this the old ones would.
        zero.parameter_offload.partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)

    def full_weights(self) -> dict[str, Tensor]:
        """Whole trained parameters by name on the CPU of rank 0, gathered one at a time."""
        self._let_go()
        weights = {}
        for name, parameter in self._named.items():
            with self._gathered_parameters([parameter], enabled=self._stage == 3):
                if self._world.is_main:
                    weights[name] = parameter.detach().cpu().clone()
        return weights

    def _forget_gradients_of_last_step(self) -> None:
        """They stay in ZeRO-3's buffers, and a parameter that is not used in the first backward would keep its own."""
        zero = self._engine.optimizer
        zero.grad_partitions_flat_buffer.zero_()
        for flat in zero.fp32_partitioned_groups_flat:
            # With offload the optimizer reads these, and only used parameters are copied there.
            if flat.grad is not None:
                flat.grad.zero_()

    def _let_go(self) -> None:
        """DeepSpeed may give back again what was kept for the rest of the step."""
        if self._keeps_gathered:
            for parameter in self._engine.module.parameters():
                parameter.ds_active_sub_modules.discard(THE_STEP)

    def _fill_missing_gradients(self) -> None:
        parameters = list(self._named.values())
        missing = agree_on_max([int(parameter.grad is None) for parameter in parameters], self._world.device)
        for parameter, is_missing in zip(parameters, missing, strict=True):
            if not is_missing:
                continue
            # Under ZeRO-3 a parameter has its shape, and so can take a gradient, only while it is gathered.
            with self._gathered_parameters([parameter], enabled=self._stage == 3):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _slices_of_stage_1_and_2(self) -> Iterator[ParameterSlice]:
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self._named.items()}
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            state = adam_state(zero.optimizer, flat)
            for parameter in group:
                # Where the rank's partition and the parameter overlap; None where they do not.
                overlap = parameter._hp_mapping
                if overlap is not None:
                    in_flat = overlap.get_hp_fragment_address()
                    yield _slice(
                        names[id(parameter)],
                        overlap.lp_fragment_address.start,
                        flat,
                        state,
                        in_flat.start,
                        in_flat.numel,
                    )

    def _slices_of_stage_3(self) -> Iterator[ParameterSlice]:
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self._named.items()}
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            state = adam_state(zero.optimizer, flat)
            offset = 0
            for parameter in group:
                elements_per_rank = parameter.partition_numel()
                start = self._world.rank * elements_per_rank
                # The last ranks' partitions may be padding in part or in whole.
                elements = max(0, min(elements_per_rank, parameter.ds_numel - start))
                if elements:
                    yield _slice(names[id(parameter)], start, flat, state, offset, elements)
                offset += elements_per_rank


def deepspeed_config(config: RunConfig, world_size: int, environment: Any = os.environ) -> dict[str, Any]:
    """DeepSpeed's settings for a run: the config file's, with everything that the run file decides.

    Raises:
        UserError: The file is missing, is not JSON, or holds a value that contradicts the run file.
    """
    named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or f"ds_configs/{config.strategy}.json"
    path = resource(Path(named))
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed config {named} cannot be read ({error}); name an existing JSON file") from None
    _refuse_contradictions(config, settings, named)
    return {
        **settings,
        # Only names of the batch: mini-batches are cut by farnear, and their surrogates carry the final scale.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": config.training.reduce == "step",
        "train_batch_size": world_size,
        "gradient_clipping": config.training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _refuse_contradictions(config: RunConfig, settings: dict[str, Any], path: str) -> None:
    training = config.training
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != int(config.strategy[-1]):
        raise UserError(
            f"{path} says zero_optimization.stage: {stage}, but the run file strategy={config.strategy}; "
            f"use ds_configs/{config.strategy}.json, or change the strategy"
        )
    wanted = {
        "gradient_clipping": ("training.max_grad_norm", training.max_grad_norm),
        "gradient_accumulation_steps": ("one accumulation step, always", 1),
        "train_batch_size": ("training.global_batch_size", training.global_batch_size),
        "train_micro_batch_size_per_gpu": ("training.mini_batch_size", training.mini_batch_size),
    }
    for key, (name, value) in wanted.items():
        if settings.get(key) not in (*LEFT_OPEN, value):
            raise UserError(
                f"{path} says {key}: {settings[key]}, but the run file {name}: {value}; take {key} out of it"
            )
    for key in ("bf16", "fp16", "torch_autocast"):
        if settings.get(key, {}).get("enabled") not in (*LEFT_OPEN, False):
            raise UserError(
                f"{path} turns {key} on, which the run file's training.bf16 decides, or training.fp16 (fp32 weights, "
                f"bf16 or fp16 compute, fp32 accumulation); take {key} out of it"
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise UserError(f"{path} has a section {key}, which the run file's training section decides; take it out")


def _slice(name: str, start: int, flat: Tensor, state: dict[str, Tensor], offset: int, elements: int) -> ParameterSlice:
    weight, exp_avg, exp_avg_sq = (
        tensor.detach().narrow(0, offset, elements) for tensor in (flat, state["exp_avg"], state["exp_avg_sq"])
    )
    return ParameterSlice(name, start, weight, exp_avg, exp_avg_sq, state["step"])
