"""A launch that is not what the run file asks for stops before the first collective, naming both sides."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from farnear.config import RunConfig, parse_config
from farnear.errors import RunStoppedError, UserError
from farnear.parallel.collectives import all_reduce_sum
from farnear.parallel.world import check_launch, on_main_rank, start_world, stop_world, tells_of_a_lost_rank, tighten
from farnear.parallel.zero import deepspeed_config
from farnear.resources import resource_root

ACCELERATE = {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
WITH_DEEPSPEED = {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true"}


def config(strategy: str, **training: Any) -> RunConfig:
    return parse_config(
        {
            "output_dir": "x",
            "strategy": strategy,
            "model": {"name_or_path": "x"},
            "data": {"train": "x"},
            "training": training,
        }
    )


@pytest.mark.parametrize(
    ("strategy", "environment"),
    [
        ("single", {}),
        ("single", {"WORLD_SIZE": "1"}),
        ("ddp", {"WORLD_SIZE": "2"}),
        ("ddp", ACCELERATE),
        ("fsdp2", ACCELERATE),
        ("zero2", {"WORLD_SIZE": "2"}),
        ("zero2", WITH_DEEPSPEED),
        ("zero2", {**WITH_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    ],
)
def test_what_fits_is_let_through(strategy: str, environment: dict[str, str]) -> None:
    check_launch(config(strategy), environment)


@pytest.mark.parametrize(
    ("strategy", "environment", "message"),
    [
        ("single", {"WORLD_SIZE": "2"}, "strategy single is one process, but the launcher started 2"),
        ("ddp", {}, "strategy ddp needs ranks, but this process was started alone.*ddp.yaml"),
        ("zero3", {"ACCELERATE_MIXED_PRECISION": "no"}, "strategy zero3 needs ranks"),
        ("zero2", ACCELERATE, "strategy=zero2, but the accelerate config starts without DeepSpeed"),
        ("ddp", WITH_DEEPSPEED, "strategy=ddp, but the accelerate config starts with DeepSpeed"),
        ("ddp", {**ACCELERATE, "ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, but the run file says strategy=ddp"),
        ("fsdp2", {**ACCELERATE, "ACCELERATE_USE_FSDP": "true"}, "asks for accelerate's own FSDP.*fsdp2.yaml"),
        ("fsdp2", WITH_DEEPSPEED, "strategy=fsdp2, but the accelerate config starts with DeepSpeed"),
        ("ddp", {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16, but.*bf16: false"),
        ("ddp", {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16, but.*fp16: false"),
        ("ddp", {**ACCELERATE, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4"),
        (
            "zero2",
            {**WITH_DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.3"},
            r"gradient_clipping: 0.3, but the run file training.max_grad_norm: 1.0",
        ),
        ("zero2", {**WITH_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage: 3, but.*strategy=zero2"),
    ],
)
def test_what_contradicts_is_named(strategy: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_launch(config(strategy), environment)


def test_the_number_of_ranks_is_the_run_files() -> None:
    asked = config("ddp").model_copy(update={"num_processes": 4})
    with pytest.raises(UserError, match="asks for num_processes=4, but the launcher started 2"):
        check_launch(asked, ACCELERATE)


def test_deepspeeds_settings_are_the_run_files(tmp_path: Path) -> None:
    settings = deepspeed_config(config("zero2", max_grad_norm=0.25), 2, {})
    assert settings["gradient_clipping"] == 0.25
    assert settings["zero_optimization"]["stage"] == 2
    # Left out, DeepSpeed would clip at 1.0.
    assert deepspeed_config(config("zero1", max_grad_norm=0.0), 2, {})["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "says zero_optimization.stage: 3, but the run file strategy=zero2"),
        ({"gradient_clipping": 5.0}, "says gradient_clipping: 5.0, but the run file training.max_grad_norm: 1.0"),
        ({"gradient_accumulation_steps": 8}, "says gradient_accumulation_steps: 8"),
        ({"train_batch_size": 7}, "says train_batch_size: 7, but the run file training.global_batch_size: 64"),
        ({"bf16": {"enabled": True}}, "turns bf16 on, which the run file's training.bf16 decides"),
        ({"fp16": {"enabled": True}}, "turns fp16 on"),
        ({"optimizer": {"type": "Adam"}}, "has a section optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section scheduler"),
    ],
)
def test_a_deepspeed_config_that_contradicts_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    own = json.loads((resource_root() / "ds_configs" / "zero2.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**own, **change}))
    with pytest.raises(UserError, match=message):
        deepspeed_config(config("zero2"), 2, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    path.write_text(json.dumps({**own, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}))
    deepspeed_config(config("zero2"), 2, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_a_deepspeed_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DeepSpeed config .*nowhere\.json cannot be read"):
        deepspeed_config(config("zero2"), 2, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "nowhere.json")})


def what_rank_0_meets(rank: int, world_size: int) -> None:
    """Every rank goes on, or stops with the same kind of error, whatever the work on rank 0 came to."""
    world = start_world(config("ddp"))

    def raises(error: Exception) -> None:
        assert rank == 0, "the work is rank 0's alone"
        raise error

    assert on_main_rank(world, lambda: f"from rank {rank}") == "from rank 0"
    with pytest.raises(UserError, match="mend it") as caught:
        on_main_rank(world, lambda: raises(UserError("mend it")))
    assert caught.value.exit_code == 2
    with pytest.raises(RunStoppedError, match="diverged") as caught:
        on_main_rank(world, lambda: raises(RunStoppedError("diverged")))
    assert caught.value.exit_code == 1
    with pytest.raises(UserError, match="No space left on device: run/x; check the path"):
        on_main_rank(world, lambda: raises(OSError(28, "No space left on device", "run/x")))
    with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match="a defect"):
        on_main_rank(world, lambda: raises(ZeroDivisionError("a defect")))
    stop_world()


def test_what_rank_0_meets_every_rank_is_told() -> None:
    run_ranks(what_rank_0_meets, 2)


def wait_too_long(rank: int, world_size: int, folder: Path) -> None:
    """Rank 1 comes three seconds late to a collective of the training, and to one of the patient groups."""
    world = start_world(config("ddp"))
    tighten(world, timedelta(seconds=1))
    assert on_main_rank(world, lambda: time.sleep(3)) is None
    started = time.monotonic()
    if rank == 1:
        time.sleep(3)
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"[Tt]im") as caught:
        all_reduce_sum(torch.ones(1))
    assert tells_of_a_lost_rank(caught.value)
    assert not tells_of_a_lost_rank(RuntimeError("The size of tensor a must match"))
    (folder / "waited").write_text(str(time.monotonic() - started))
    os._exit(0)


def test_once_tightened_a_collective_waits_no_longer(tmp_path: Path) -> None:
    run_ranks(wait_too_long, 2, tmp_path)
    assert 0.9 < float((tmp_path / "waited").read_text()) < 2.5
