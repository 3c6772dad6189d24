"""The cached step under zero1, zero2 and zero3 on one rank against the uncached gradient: `gpu_step.py --zero`."""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from exactness import relative_error
from gpu_inputs import WORDS, Inputs, Setting
from torch import Tensor

from farnear.config import RunConfig, parse_config
from farnear.model.embedder import Embedder
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import World
from farnear.resources import resource
from farnear.sections import LossConfig, ModelConfig
from farnear.training.cache import CachedStep
from farnear.training.step import StepFigures

OF_ZERO = Setting({}, {}, 12, 12, (64, 128), 12, (2,), (128, 64), bf16=False)


def zero_figures(device: torch.device, say: Callable[[str], None], stages: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """Relative error of one update under stages of ZeRO, one rank."""
    errors: dict[str, float] = {}
    # TF32 would round convolutions, and the bound is fp32's.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as folder, one_rank(device):
        base = save_tiny_model(Path(folder) / "base", texts=[" ".join(WORDS)])
        inputs = Inputs(load_model(ModelConfig(name_or_path=str(base))), OF_ZERO)
        gradient, learning_rate = uncached_gradient(base, inputs, device)
        wanted = {name: learning_rate * g for name, g in gradient.items()}
        for stage in stages:
            for overlap in (False, True):
                # Under `mini_batch` gradients meet within every backward, which is where overlapping has its place.
                for reduce in ("step", "mini_batch") if stage > 1 else ("step",):
                    name = f"zero{stage}{'-overlap' if overlap else ''}{'-mini_batch' if reduce != 'step' else ''}"
                    settings = deepspeed_settings(Path(folder), stage, overlap)
                    with patch.dict(os.environ, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings)}):
                        update = cached_update(
                            {"strategy": f"zero{stage}", "training": {"reduce": reduce}},
                            base,
                            inputs,
                            learning_rate,
                            device,
                        )
                    errors[name] = relative_error(update, wanted)
                    say(f"  {name:28} {errors[name]:.1e}")
    import deepspeed

    return {"deepspeed": deepspeed.__version__, "worst_error": max(errors.values()), "zero": errors}


def uncached_gradient(base: Path, inputs: Inputs, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """What strategy single gets from the batch in one piece, and a rate at which its update is as large as the weights.

    A smaller update would be lost in the weights' own rounding.
    """
    model = load_model(ModelConfig(name_or_path=str(base))).to(device)
    module, world = Embedder(model, bf16=False), World(0, 1, device)
    config = zero_run(base, {"strategy": "single"})
    strategy = build_strategy(config, module, torch.optim.SGD(module.parameters(), lr=1.0), world)
    strategy.train(True)
    CachedStep(strategy, world, config.loss, 0, keep_graphs=1.0).gradient(
        inputs.cut_batch(OF_ZERO.pairs, None), StepFigures(), scale=config.loss.scale
    )
    gradient = {name: p.grad.detach().cpu() for name, p in module.named_parameters() if p.grad is not None}
    weights = torch.stack([p.detach().norm() for p in module.parameters()]).norm()
    return gradient, float(weights) / float(torch.stack([g.norm() for g in gradient.values()]).norm())


def cached_update(
    keys: Mapping[str, Any], base: Path, inputs: Inputs, learning_rate: float, device: torch.device
) -> dict[str, Tensor]:
    """Old weights minus new, of one SGD step with mini-batches of two pages and half of the graphs kept."""
    config, world = zero_run(base, keys), World(0, 1, device)
    model = load_model(config.model).to(device)
    module = Embedder(model, bf16=False)
    before = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
    strategy = build_strategy(config, module, torch.optim.SGD(module.parameters(), lr=learning_rate), world)
    strategy.train(True)
    figures = StepFigures()
    batch = inputs.cut_batch(OF_ZERO.pairs, OF_ZERO.pages_at_once[0] * int(inputs.page_tokens_n.max()))
    step = CachedStep(strategy, world, config.loss, 0, keep_graphs=0.5)
    step.gradient(batch, figures, scale=config.loss.scale)
    if not 0 < figures.kept_graphs < len(batch.mini_batches):
        raise RuntimeError("some graphs were to be kept, and others computed again")
    strategy.step(learning_rate)
    after = strategy.full_weights()
    return {name: before[name] - after[name] for name in before}


def zero_run(base: Path, keys: Mapping[str, Any]) -> RunConfig:
    """A run file without clipping."""
    training = {"max_grad_norm": 0.0, **keys.get("training", {})}
    loss = LossConfig(matryoshka_dims=OF_ZERO.dims).model_dump(exclude_unset=True)
    tree = {"output_dir": "unused", "model": {"name_or_path": str(base)}, "data": {"train": ["unused"]}, "loss": loss}
    return parse_config({**tree, **keys, "training": training})


def deepspeed_settings(folder: Path, stage: int, overlap: bool) -> Path:
    """The stage's own file, with buckets and a threshold under which a small model is treated as a large one."""
    settings = json.loads(resource(f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
    settings["zero_optimization"] |= {"overlap_comm": overlap, "reduce_bucket_size": 100_000}
    if stage == 3:
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 1000}
    path = folder / f"zero{stage}-{overlap}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed asks for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with patch.dict(os.environ, place):
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        try:
            yield
        finally:
            dist.destroy_process_group()
