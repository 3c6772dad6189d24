"""accelerate_configs/ and ds_configs/: parsed by accelerate and DeepSpeed, and started on one machine and on two."""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from ranks import free_port
from tiny_runs import make_inputs, run_config, run_tree

from farnear.errors import UserError
from farnear.launching.local import launch
from farnear.parallel.world import check_launch
from farnear.parallel.zero import deepspeed_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in CONFIGS]
ZERO = ["zero1", "zero2", "zero3", "zero3_offload"]


def strategy_of(name: str) -> str:
    """That a config pairs with in the run file."""
    return "ddp" if name == "cpu" else name.removesuffix("_offload")


def words_of_machine(rank: int, port: int, processes: int) -> list[str]:
    """What one of two machines adds to the command, as the configs' comments say."""
    return [
        *("--num_machines", "2", "--machine_rank", str(rank), "--num_processes", str(processes)),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
    ]


def read_by_accelerate(path: Path, *words: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """What `accelerate launch` makes of a config and words: torchrun's arguments, and the environment of ranks."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *words, "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return arguments, prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    command, environment = prepare_deepspeed_cmd_env(arguments)
    assert command is None, "pdsh or another launcher of DeepSpeed's would start the ranks"
    return arguments, environment


# Read


def test_there_is_a_config_for_every_strategy() -> None:
    assert ["cpu", "ddp", "fsdp2", *ZERO] == NAMES
    assert [path.stem for path in DEEPSPEED_CONFIGS] == ZERO


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_accelerate_knows_every_key(path: Path, tmp_path: Path) -> None:
    config = load_config_from_file(str(path))
    is_zero = path.stem in ZERO
    # Other types start one process on a machine without GPUs.
    assert config.distributed_type == (DistributedType.DEEPSPEED if is_zero else DistributedType.MULTI_GPU)
    assert not config.use_cpu
    # Passed on to torchrun as it is, which counts GPUs, or CPU cores if there are none.
    assert config.num_processes == (2 if path.stem == "cpu" else "auto")
    assert config.main_process_port == 0
    # The run file decides about precision.
    assert config.mixed_precision is None
    # Of a section accelerate takes any key and reads those that are options.
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.deepspeed_config or {}) <= set(options)
    named = (config.deepspeed_config or {}).get("deepspeed_config_file")
    assert named == (f"ds_configs/{path.stem}.json" if is_zero else None)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text() + "\nmax_restarts: 0\n")
    with pytest.raises(ValueError, match=r"unknown keys \(\['max_restarts'\]\)"):
        load_config_from_file(str(wrong))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_config_says_when_to_use_it_and_how(path: Path) -> None:
    text = " ".join(path.read_text().replace("#", "").split())
    words = f"accelerate launch --config_file accelerate_configs/{path.name}"
    assert f"{words} launch/train.py RUN.yaml" in text
    assert (
        f"{words} --num_machines N --machine_rank R \\ --num_processes T --main_process_ip ADDRESS "
        "--main_process_port 29500 launch/train.py RUN.yaml"
    ) in text
    assert f"`strategy: {strategy_of(path.stem)}`" in text
    assert path.stem == "cpu" or (
        re.search(r"bytes a parameter|parameter takes .* bytes", text) and re.search(r"[Cc]ommunicat|gather", text)
    )


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_config_starts_what_its_strategy_asks_for(path: Path, tmp_path: Path) -> None:
    arguments, environment = read_by_accelerate(path)
    assert (arguments.nproc_per_node, arguments.num_machines) == ("2" if path.stem == "cpu" else "auto", 1)
    assert int(arguments.master_port) > 0
    for words in ([], words_of_machine(1, 29512, 4)):
        arguments, environment = read_by_accelerate(path, *words)
        started = {**environment, "WORLD_SIZE": "4"}
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
            config = run_config(tmp_path, "run", strategy=strategy)
            is_zero = strategy.startswith("zero")
            if strategy != strategy_of(path.stem) and (is_zero or path.stem in ZERO):
                with pytest.raises(UserError, match=r"accelerate config starts with|zero_optimization\.stage"):
                    check_launch(config, started)
                    deepspeed_config(config, 4, started)
                continue
            check_launch(config, started)
            if is_zero:
                deepspeed_config(config, 4, started)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_several_machines_need_no_more_than_their_words(path: Path) -> None:
    arguments, _ = read_by_accelerate(path, *words_of_machine(1, 29512, 4))
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "2", 1)
    assert arguments.rdzv_endpoint == "127.0.0.1:29512"
    # What accelerate does not read from a file is right by itself.
    assert (arguments.rdzv_backend, arguments.max_restarts) == ("static", 0)


def test_without_its_key_deepspeed_would_want_pdsh(tmp_path: Path) -> None:
    lines = (ROOT / "accelerate_configs" / "zero2.yaml").read_text().splitlines()
    without = tmp_path / "without.yaml"
    without.write_text("\n".join(line for line in lines if "deepspeed_multinode_launcher" not in line))
    with pytest.raises(AssertionError, match="pdsh"):
        read_by_accelerate(without, *words_of_machine(0, free_port(), 4))


@pytest.mark.parametrize("path", DEEPSPEED_CONFIGS, ids=ZERO)
def test_a_deepspeed_config_leaves_the_run_files_decisions_open(path: Path) -> None:
    settings = json.loads(path.read_text())
    assert list(settings) == ["zero_optimization"]
    assert settings["zero_optimization"]["stage"] == int(path.stem[4])
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize("path", DEEPSPEED_CONFIGS, ids=ZERO)
def test_deepspeed_knows_every_setting(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(path.read_text())["zero_optimization"]
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(settings) <= known
    assert DeepSpeedZeroConfig(**settings).stage == int(path.stem[4])
    with pytest.raises(ValueError, match="reduce_bucket"):
        DeepSpeedZeroConfig(**settings, reduce_bucket=1)


def test_offload_is_stage_3_and_offload() -> None:
    plain, offload = (
        json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]
        for name in ("zero3", "zero3_offload")
    )
    in_host_memory = {"device": "cpu", "pin_memory": True}
    assert offload == {**plain, "offload_optimizer": in_host_memory, "offload_param": in_host_memory}


# Started, without a training


TELL = """import json, os, sys
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
names += ("TORCHELASTIC_MAX_RESTARTS",)
names += ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "CUDA_VISIBLE_DEVICES")
print(json.dumps({name: os.environ.get(name, "") for name in names}), file=open(sys.argv[1] + os.environ["RANK"], "x"))
"""


def be_a_machine(number: int, machines: list[list[str]]) -> None:
    """`accelerate launch` in a process that has imported it already."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    launch_command(launch_command_parser().parse_args(machines[number]))


def test_every_config_starts_two_machines_of_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    ports = {path.stem: free_port() for path in CONFIGS}
    machines = [
        [
            *("--config_file", str(path), *words_of_machine(rank, ports[path.stem], 4)),
            *(str(tmp_path / "tell.py"), str(tmp_path / path.stem)),
        ]
        for path in CONFIGS
        for rank in (1, 0)  # the one that others come to need not be the first
    ]
    context = mp.start_processes(be_a_machine, (machines,), nprocs=len(machines), join=False, start_method="forkserver")
    try:
        while not context.join(timeout=60):
            pass
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    for path in CONFIGS:
        told = [json.loads((tmp_path / f"{path.stem}{rank}").read_text()) for rank in range(4)]
        places = [(one["RANK"], one["LOCAL_RANK"], one["GROUP_RANK"]) for one in told]
        assert places == [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")], path
        assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in told} == {("4", "2")}
        assert {(one["MASTER_PORT"], one["TORCHELASTIC_MAX_RESTARTS"]) for one in told} == {
            (str(ports[path.stem]), "0")
        }
        is_zero = path.stem in ZERO
        deepspeed = ("true", f"ds_configs/{path.stem}.json") if is_zero else ("", "")
        asked = {(one["ACCELERATE_USE_DEEPSPEED"], one["ACCELERATE_DEEPSPEED_CONFIG_FILE"]) for one in told}
        assert asked == {deepspeed}
        assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {"-1,-1" if path.stem == "cpu" else ""}


# Trainings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def soak_but(fast: str) -> list[Any]:
    """Every config; all but one are for `make soak`, as a launch takes ten seconds and more."""
    return [pytest.param(name, marks=() if name == fast else pytest.mark.soak) for name in NAMES]


def write_run(inputs: Path, folder: Path, name: str) -> Path:
    tree: dict[str, Any] = run_tree(inputs, "run", strategy=strategy_of(name), training={"max_steps": 2})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**tree, "output_dir": str(folder / "run")}))
    return path


def summary_of(folder: Path) -> tuple[str, int, int]:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["strategy"], summary["world_size"], summary["steps"]


@pytest.mark.parametrize("name", soak_but("zero3_offload"))
def test_a_run_starts_on_one_machine(inputs: Path, tmp_path: Path, name: str) -> None:
    run_file = write_run(inputs, tmp_path, name)
    assert launch(run_file, [], config_file=ROOT / "accelerate_configs" / f"{name}.yaml", num_processes=2) == 0
    assert summary_of(tmp_path) == (strategy_of(name), 2, 2)


@pytest.mark.parametrize("name", soak_but("zero2"))
def test_a_run_starts_on_two_machines(inputs: Path, tmp_path: Path, name: str) -> None:
    run_file, port = write_run(inputs, tmp_path, name), free_port()
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", f"accelerate_configs/{name}.yaml", *words_of_machine(rank, port, 2)),
                *("launch/train.py", str(run_file)),
            ],
            cwd=ROOT,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            with suppress(ProcessLookupError):
                machine.terminate()  # torchrun ends its ranks
    assert summary_of(tmp_path) == (strategy_of(name), 2, 2)
