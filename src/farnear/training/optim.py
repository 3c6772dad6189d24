"""AdamW and the course of the learning rate."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import get_scheduler

from farnear.errors import UserError
from farnear.sections import TrainingConfig


def build_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; those of one dimension (biases, norms) are not decayed.

    It is torch's fused one, transformers' default too: one pass over each parameter and no temporaries, which would be
    as large as all second moments on a GPU and twice the largest parameter on a CPU. With its moments in 8 bits it is
    bitsandbytes', which CI cannot run (see `farnear.parallel.eight_bit`).

    Raises:
        UserError: That one is asked for without its package or without a GPU.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
    if training.optim == "adamw_8bit":
        adamw = _eight_bit_adamw(trainable[0].device)
    return adamw(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )


def _eight_bit_adamw(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "training.optim: adamw_8bit needs bitsandbytes, which is not installed here; pip install bitsandbytes, or "
            "set adamw_torch"
        ) from None
    if device.type != "cuda":
        raise UserError(
            f"training.optim: adamw_8bit needs an NVIDIA GPU, and this run is on {device.type}; set adamw_torch"
        )
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return optimizer


def learning_rate_schedule(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each step (0-based) as a pure function, so that a resume has no schedule to restore.

    The shapes are transformers' own: its scheduler is built around a throw-away optimizer and its factor taken out.
    """
    throw_away = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        throw_away,
        num_warmup_steps=warmup_steps(training, total_steps),
        num_training_steps=total_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: training.learning_rate * factor(step)


def warmup_steps(training: TrainingConfig, total_steps: int) -> int:
    """Steps of warm-up, as transformers counts them: a value below 1 is a share; warmup_steps goes before the ratio."""
    if training.warmup_steps >= 1:
        return int(training.warmup_steps)
    return math.ceil((training.warmup_steps or training.warmup_ratio) * total_steps)


def steps_of(value: float | None, total_steps: int) -> int | None:
    """An interval in steps, from a number of steps or, below 1, a share of all; None and 0 mean never."""
    if not value:
        return None
    return int(value) if value >= 1 else max(1, math.ceil(value * total_steps))
