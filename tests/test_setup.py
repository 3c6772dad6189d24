"""What launchers, make and pip read: the sbatch script, the Makefile, the wheel."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from farnear.config import load_config
from farnear.flywheel_file import is_flywheel, read_flywheel

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_run_file(path: Path) -> None:
    if is_flywheel(path):
        assert len(read_flywheel(path).stages) > 1
    else:
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
        project[project.index(start) :].partition("]\n")[0]
        for start in ("dependencies = [", "pdf = [", "docs = [", "dev = [")
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
        "local.supervise = lambda command, environment, **_: 0\n"
        "from farnear.cli import main\n"
        "sys.exit(main(['launch', 'run.yaml', 'strategy=zero2']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    own = "site/farnear/_resources"
    shown = ended.stdout.splitlines()[-1].split()
    assert shown[3:5] == [f"{own}/accelerate_configs/zero2.yaml", f"{own}/launch/train.py"]
