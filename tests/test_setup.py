"""What launchers, make and pip read: accelerate and DeepSpeed configs, the sbatch script, the Makefile, the wheel."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from farnear.config import load_config

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def test_there_is_a_config_for_every_strategy() -> None:
    zero = ["zero1", "zero2", "zero3", "zero3_offload"]
    assert [path.stem for path in ACCELERATE_CONFIGS] == ["cpu", "ddp", "fsdp2", *zero]
    assert [path.stem for path in DEEPSPEED_CONFIGS] == zero


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_its_config(path: Path) -> None:
    config = load_config_from_file(str(path))
    is_zero = path.stem.startswith("zero")
    # Other types start one process on a machine without GPUs.
    assert config.distributed_type == (DistributedType.DEEPSPEED if is_zero else DistributedType.MULTI_GPU)
    assert not config.use_cpu
    # Passed on to torchrun as it is, which counts GPUs, or CPU cores if there are none.
    assert config.num_processes == (2 if path.stem == "cpu" else "auto")
    assert config.main_process_port == 0
    # The run file decides about precision.
    assert config.mixed_precision is None
    named = (config.deepspeed_config or {}).get("deepspeed_config_file")
    assert named == (f"ds_configs/{path.stem}.json" if is_zero else None)


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_when_to_use_it_and_how(path: Path) -> None:
    text = path.read_text()
    assert f"--config_file accelerate_configs/{path.name} launch/train.py RUN.yaml" in text
    strategy = "ddp" if path.stem == "cpu" else path.stem.removesuffix("_offload")
    assert f"`strategy: {strategy}`" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize("path", DEEPSPEED_CONFIGS, ids=lambda path: path.stem)
def test_a_deepspeed_config_leaves_the_run_files_decisions_open(path: Path) -> None:
    settings = json.loads(path.read_text())
    assert list(settings) == ["zero_optimization"]
    assert settings["zero_optimization"]["stage"] == int(path.stem[4])
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize("path", DEEPSPEED_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_knows_every_setting(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(path.read_text())["zero_optimization"]
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(settings) <= known
    assert DeepSpeedZeroConfig(**settings).stage == int(path.stem[4])


def test_offload_is_stage_3_and_offload() -> None:
    plain, offload = (
        json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]
        for name in ("zero3", "zero3_offload")
    )
    in_host_memory = {"device": "cpu", "pin_memory": True}
    assert offload == {**plain, "offload_optimizer": in_host_memory, "offload_param": in_host_memory}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_run_file(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "launch/node.sh"])
def test_shell_scripts_can_be_parsed(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_make_help_lists_every_target() -> None:
    text = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make (\w+) +\S", text, re.MULTILINE)
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == phony.split()
    assert set(listed) >= {"help", "demo", "test", "lint", "bench", "soak"}


def test_constraints_are_names_and_versions_of_everything_required() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {re.sub(r"[._-]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    sections = [
        project[project.index(start) :].partition("]\n")[0] for start in ("dependencies = [", "pdf = [", "dev = [")
    ]
    required = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)>=', "\n".join(sections))}
    assert len(required) > 15
    assert required <= pinned, required - pinned


def test_a_wheel_carries_what_launchers_read(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    [wheel] = tmp_path.glob("farnear-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for folder in ("launch", "accelerate_configs", "ds_configs", "slurm"):
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                packed = site / "farnear" / "_resources" / folder / path.name
                assert packed.read_bytes() == path.read_bytes(), path
    modules = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    own = site / "farnear" / "_resources"
    assert modules == {path.relative_to(site) for path in set(site.rglob("*.py")) - set(own.rglob("*.py"))}
    assert {path.name for path in site.iterdir()} == {"farnear", wheel.name.replace("-py3-none-any.whl", ".dist-info")}

    # Where no clone exists the commands find the wheel's own files.
    run_file = tmp_path / "run.yaml"
    run_file.write_text("output_dir: run\nmodel: {name_or_path: m}\ndata: {train: [a.tar]}\n")
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from farnear.launching import local\n"
        "local.supervise = lambda command, environment: 0\n"
        "from farnear.cli import main\n"
        "sys.exit(main(['launch', 'run.yaml', 'strategy=zero2']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    own = "site/farnear/_resources"
    shown = ended.stdout.splitlines()[-1].split()
    assert shown[3:5] == [f"{own}/accelerate_configs/zero2.yaml", f"{own}/launch/train.py"]
