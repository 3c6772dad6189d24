"""farnear doctor: a healthy machine passes, and each of the seeded faults fails by name and says what to do.

Faults are real ones where that is possible: a mount, a limit, a damaged file, an environment variable. What a mount or
a limit changes is changed for one process that runs the command; `unshare` keeps mounts out of everybody else's sight.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from tar_makers import image_bytes, write_tar
from tiny_runs import make_inputs, run_tree

from farnear import cli
from farnear.commands.doctor import CHECKS
from farnear.launching import doctor
from farnear.launching.findings import Finding, Subject
from farnear.model.tiny import save_tiny_model
from farnear.resources import resource_root

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("doctor"))


def run_file(folder: Path, output_dir: str = "run", **keys: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(folder, output_dir, **keys)))
    return path


def told(capsys: Capture, *words: object) -> tuple[int, dict[str, list[str]], str]:
    """(exit code, lines by check, the error line) of the command, in this process."""
    capsys.readouterr()
    code = cli.main(["doctor", *map(str, words)])
    captured = capsys.readouterr()
    return code, _by_check(captured.out), captured.err


def told_inside(script: str, *words: object, **environment: str) -> tuple[int, dict[str, list[str]], str]:
    """The same in a process of its own, after some lines of shell."""
    command = shlex.join([sys.executable, "-m", "farnear", "doctor", *map(str, words)])
    done = subprocess.run(
        ["bash", "-ec", f"{script}\nexec {command}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, _by_check(done.stdout), done.stderr


def _by_check(out: str) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for line in out.splitlines():
        if line.split()[0] in ("ok", "note", "FAIL"):
            lines.setdefault(line.split()[1], []).append(line)
    return lines


def the_failure(result: tuple[int, dict[str, list[str]], str], check: str) -> str:
    """The FAIL line of a check, when everything about it is as it should be."""
    code, lines, error = result
    assert code == 2, (lines, error)
    (line,) = [line for line in lines[check] if line.startswith("FAIL")]
    assert "; " in line  # what to do
    assert f"failed: {check}" in error or f", {check}" in error
    assert error.count("farnear: error: ") == 1
    return line


@pytest.fixture
def in_a_mount_namespace() -> str:
    """Shell that comes before mounts."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("MOUNTS CANNOT BE MADE HERE: this fault of the doctor's goes untested (unshare -m needs root)")
    return 'if [ -z "$INSIDE" ]; then INSIDE=1 exec unshare -m bash -ec "$BASH_EXECUTION_STRING"; fi'


# A machine where all is well


def test_a_healthy_machine_passes_and_nothing_is_left_behind(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    path = run_file(folder, strategy="ddp", num_processes=2)
    before = _tree(folder)
    code, lines, error = told(capsys, path)
    assert code == 0, (lines, error)
    assert set(lines) == set(CHECKS)
    assert "bound 1.0e-04, for fp32" in lines["gradient"][0]
    assert "8 pairs, 4 mini-batches a rank, ddp" in lines["gradient"][0]
    assert "2 ranks under ddp" in lines["launch"][0]
    assert "GB/s" in lines["bandwidth"][0]
    assert "pages/s" in lines["decode"][0]
    assert _tree(folder) == before
    assert list(tmp_path.iterdir()) == []


def _tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_without_a_run_file_the_machine_is_looked_at(capsys: Capture) -> None:
    code, lines, error = told(capsys, "--skip", "launch,bandwidth")
    assert code == 0, (lines, error)
    assert set(lines) == set(doctor.OF_MACHINE)
    assert f"torch {version('torch')}" in lines["versions"][0]


def test_a_run_folder_is_looked_at_and_not_touched(folder: Path, capsys: Capture) -> None:
    run = folder / "started"
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "run.lock").touch()
    before = _tree(run)
    code, lines, _ = told(capsys, run_file(folder, "started"), "--only", "output_dir")
    assert code == 0
    assert lines["output_dir"][0].startswith("note")
    assert "step-00000003" in lines["output_dir"][0]
    assert "--resume" in lines["output_dir"][0]
    assert _tree(run) == before


def test_a_check_that_crashes_or_hangs_is_a_finding_and_not_the_end(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(subject: Subject) -> list[Finding]:
        raise ZeroDivisionError("by zero")

    hang = threading.Event()

    def wait(subject: Subject) -> list[Finding]:
        hang.wait(60)
        return []

    checks = {"files": crash, "shm": wait, "disk": doctor.OF_MACHINE["disk"]}
    monkeypatch.setattr(doctor, "OF_MACHINE", checks)
    code, lines, error = told(capsys, "--only", "files,shm,disk", "--timeout", "1")
    hang.set()
    assert code == 2
    assert "ZeroDivisionError: by zero (test_doctor.py:" in lines["files"][0]
    assert "it did not end within 1 s" in lines["shm"][0]
    assert lines["disk"][0].startswith("ok")
    assert "2 of 3 checks failed: files, shm" in error


def test_a_check_that_does_not_exist_is_named(capsys: Capture) -> None:
    assert cli.main(["doctor", "--only", "disc"]) == 2
    assert "'disc' is no check; they are versions, gpus" in capsys.readouterr().err


def test_gpus_that_torch_does_not_see(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    line = the_failure(told(capsys, "--only", "gpus"), "gpus")  # the tests hide GPUs from torch
    assert line.startswith("FAIL  gpus          nvidia-smi knows of 1 GPU, and torch")
    assert "CUDA_VISIBLE_DEVICES" in line


# Seeded faults of the machine


def test_an_old_package(tmp_path: Path) -> None:
    for name, number in (("farnear", "0.0"), ("pydantic", "1.10.2")):
        info = tmp_path / f"{name}-{number}.dist-info"
        info.mkdir()
        requires = "Requires-Dist: pydantic>=2.9\nRequires-Python: >=3.10\n" if name == "farnear" else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{requires}")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(cli.__file__).parents[1])])
    line = the_failure(told_inside("", "--only", "versions", PYTHONPATH=path), "versions")
    assert "pydantic 1.10.2 is installed, and farnear needs pydantic>=2.9" in line
    assert "pip install --upgrade 'pydantic>=2.9'" in line


def test_too_few_open_files(folder: Path) -> None:
    line = the_failure(told_inside("ulimit -Sn 64; ulimit -Hn 4096", run_file(folder), "--only", "files"), "files")
    assert "64 open files" in line
    assert "; ulimit -n 4096 before the launch" in line
    line = the_failure(told_inside("ulimit -n 64", run_file(folder), "--only", "files"), "files")
    assert "; the hard limit is 64: a new shell or the administrator raises it" in line


def test_too_little_shared_memory(folder: Path, in_a_mount_namespace: str) -> None:
    path = run_file(folder, strategy="ddp", num_processes=2, data={"dataloader_num_workers": 2})
    script = f"{in_a_mount_namespace}\nmount -t tmpfs -o size=1m tmpfs /dev/shm"
    line = the_failure(told_inside(script, path, "--only", "shm"), "shm")
    assert "1.0 MB free in /dev/shm" in line
    assert "2 ranks x 2 workers x 4 mini-batches" in line
    assert "--shm-size=1g" in line


def test_a_disk_without_room_for_checkpoints(folder: Path, in_a_mount_namespace: str, tmp_path: Path) -> None:
    path = run_file(folder, str(tmp_path / "runs" / "mine"))
    (tmp_path / "runs").mkdir()
    script = f"{in_a_mount_namespace}\nmount -t tmpfs -o size=1m tmpfs {tmp_path / 'runs'}"
    line = the_failure(told_inside(script, path, "--only", "disk"), "disk")
    assert f"1.0 MB free for output_dir {tmp_path / 'runs' / 'mine'}" in line
    assert "2 checkpoints of 5.4 MB" in line
    assert "training.save_total_limit" in line


def test_an_output_dir_that_cannot_be_written(folder: Path, in_a_mount_namespace: str, tmp_path: Path) -> None:
    path = run_file(folder, str(tmp_path / "runs" / "mine"))
    (tmp_path / "runs").mkdir()
    script = f"{in_a_mount_namespace}\nmount -t tmpfs -o ro tmpfs {tmp_path / 'runs'}"
    line = the_failure(told_inside(script, path, "--only", "output_dir"), "output_dir")
    assert "Read-only file system" in line
    assert "set another output_dir" in line


def test_more_ranks_than_cores(folder: Path, capsys: Capture) -> None:
    cores = len(os.sched_getaffinity(0))
    path = run_file(folder, strategy="ddp", num_processes=cores + 1)
    line = the_failure(told(capsys, path, "--only", "ranks"), "ranks")
    assert f"{cores + 1} ranks on {cores} cores" in line
    assert f"num_processes={cores}" in line


def test_no_compiler_where_one_is_needed(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    path = run_file(folder, model={"attn_implementation": "flex_attention"})
    line = the_failure(told(capsys, path, "--only", "compiler"), "compiler")
    assert "no g++, no ninja here" in line
    assert "apt-get install g++" in line
    code, lines, _ = told(capsys, run_file(folder), "--only", "compiler")
    assert (code, lines["compiler"][0][:4]) == (0, "note")


# Seeded faults of the run


def test_attention_that_is_not_installed(folder: Path, capsys: Capture) -> None:
    path = run_file(folder, model={"attn_implementation": "flash_attention_2"})
    line = the_failure(told(capsys, path, "--only", "attention"), "attention")
    assert "flash_attention_2" in line
    assert "sdpa" in line


def test_a_model_that_is_not_there(folder: Path, capsys: Capture) -> None:
    path = run_file(folder, model={"name_or_path": str(folder / "bse")})
    assert f"there is no model folder {folder / 'bse'}" in the_failure(told(capsys, path, "--only", "model"), "model")
    path = run_file(folder, model={"name_or_path": "some/model"})  # HF_HUB_OFFLINE is set in all tests
    line = the_failure(told(capsys, path, "--only", "model"), "model")
    assert "some/model is not in the cache" in line
    assert "farnear prefetch RUN.yaml" in line


def test_what_needs_a_model_that_is_not_there_is_not_tried(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was mistyped is taken for a name on the hub, and there is no network to ask it."""
    from huggingface_hub import HfApi, constants

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    path = run_file(folder, model={"name_or_path": "runs/nothing"})
    result = told(capsys, path, "--only", "model,gradient,decode")
    line = the_failure(result, "model")
    assert "the hub cannot be asked (ConnectionError: Name or service not known)" in line
    assert "no network here: farnear prefetch RUN.yaml where there is one" in line
    assert "log in" not in line
    for check in ("gradient", "decode"):
        (line,) = result[1][check]
        assert line.endswith("not measured: the model cannot be loaded here; mend that first")


def test_too_many_workers_are_told_how_many_would_do(folder: Path, capsys: Capture) -> None:
    cores = len(os.sched_getaffinity(0))
    path = run_file(folder, strategy="ddp", num_processes=cores, data={"dataloader_num_workers": 2})
    _, lines, _ = told(capsys, path, "--only", "ranks")
    assert "data.dataloader_num_workers=" in lines["ranks"][0]


def test_a_shard_that_is_missing(folder: Path, capsys: Capture) -> None:
    path = run_file(folder, data={"train": str(folder / "data" / "train-{000000..000001}.tar")})
    line = the_failure(told(capsys, path, "--only", "shards"), "shards")
    assert "train-000001.tar does not exist" in line
    assert "check" in line


def test_a_shard_that_was_cut_short(folder: Path, capsys: Capture, tmp_path: Path) -> None:
    whole = next((folder / "data").glob("train-*.tar"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    path = run_file(folder, data={"train": str(cut)})
    line = the_failure(told(capsys, path, "--only", "index"), "index")
    assert f"{cut} at byte" in line
    assert "farnear shards verify" in line
    _, lines, _ = told(capsys, path, "--only", "index,gradient,decode")
    assert lines["gradient"] == ["note  gradient      not measured: see index"]
    assert lines["decode"] == ["note  decode        not measured: see index"]


# Seeded faults that ranks find


def test_a_gradient_that_no_cache_gives_and_pages_that_take_too_long(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A loss that remembers, and pages of 6 megapixels without workers; one launch finds both."""
    shard = _write_huge_pages(tmp_path / "huge.tar")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    path = run_file(
        folder,
        loss={"function": "own_losses:one_that_remembers", "matryoshka_dims": None},
        data={"train": str(shard)},
        model={"max_pixels": 4096},
    )
    result = told(capsys, path, "--only", "gradient,decode")
    line = the_failure(result, "gradient")
    assert "bound 1.0e-04, for fp32" in line
    assert "a loss that remembers" in line
    line = the_failure(result, "decode")
    assert "no worker does it" in line
    assert "set data.dataloader_num_workers=" in line


def _write_huge_pages(path: Path) -> Path:
    members = []
    for number in range(12):
        page = image_bytes(number, size=(3000, 2000))
        members += [(f"k{number}.json", json.dumps({"query": f"query {number}"}).encode()), (f"k{number}.png", page)]
    return write_tar(path, members)


def test_ranks_that_cannot_meet(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    path = run_file(folder, strategy="ddp", num_processes=2)
    result = told(capsys, path, "--only", "launch,bandwidth", "--timeout", "20")
    line = the_failure(result, "launch")
    assert "the ranks cannot meet" in line
    assert "GLOO_SOCKET_IFNAME" in line
    assert result[1]["bandwidth"][0].startswith("note")


def test_a_rank_that_nobody_meets_says_so_in_time(tmp_path: Path) -> None:
    """As behind a firewall: one of two ranks, and the other never comes."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    program = [sys.executable, str(resource_root() / "launch" / "doctor.py"), str(tmp_path), "launch", "2"]
    done = subprocess.run(program, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("farnear: error: the ranks cannot meet (")
    assert "1/2 clients joined" in line
    assert "a firewall" in line


# What takes longer


@pytest.mark.soak
@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ("ddp", {"loss": {"function": "own_losses:softmax", "gather": False}}),
        ("zero2", {"training": {"fp16": True}}),
        ("zero3", {}),
        ("fsdp2", {"training": {"bf16": True, "keep_graphs": "auto"}}),
    ],
)
def test_every_strategy_is_exact_with_dropout_too(
    strategy: str, keys: dict[str, Any], folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    model = save_tiny_model(folder / "dropout", hidden_size=64, num_layers=2, attention_dropout=0.1)
    path = run_file(folder, strategy=strategy, num_processes=2, model={"name_or_path": str(model)}, **keys)
    code, lines, error = told(capsys, path, "--only", "gradient")
    assert code == 0, (lines, error)
    assert lines["gradient"][0].startswith("ok")


@pytest.mark.soak
def test_an_accelerate_config_that_contradicts_the_run_file(folder: Path, capsys: Capture, tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.25}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    config = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 2,
        "main_process_port": 0,
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False},
    }
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(config))
    path = run_file(folder, strategy="zero2", num_processes=2)
    result = told(capsys, path, "--only", "launch", "--config_file", tmp_path / "zero2.yaml")
    line = the_failure(result, "launch")
    assert "ds.json says gradient_clipping: 0.25, but the run file training.max_grad_norm: 1.0" in line
    assert "take gradient_clipping out of it" in line
