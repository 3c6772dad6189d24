"""Jobs on a real SLURM: a run is told to save in every way that a cluster has, is killed, and ends as if nothing was.

The cluster has two nodes on loopback (`slurm_cluster.py`). Where its packages are missing these tests are skipped;
`.ci/run` installs them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from slurm_cluster import cluster, is_installed, slurm
from tiny_runs import make_inputs, run_tree

from farnear.config import load_config
from farnear.training.run import run_training

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="NOT TESTED: SLURM jobs. Needs root and the packages slurm-wlm and munge (see .ci/run)"
)

TESTS = Path(__file__).parent
RUN = "it's 100% mine"  # a run folder that has to be quoted
COMMENT = "a \"comment\" with 'quotes' and $HOME"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster, for its commands."""
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield {**environment, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}


class Job:
    """A submitted run, seen from outside."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        words = [sys.executable, "-m", "farnear", "submit", "run.yaml", "--nodes", "2"]
        ended = subprocess.run(
            words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=180
        )
        found = re.match(r"job (\d+) submitted", ended.stdout)
        assert found, ended.stderr
        self.id = found[1]

    @property
    def facts(self) -> str:
        return slurm(self.environment, "scontrol", "show", "job", self.id)

    @property
    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", self.facts)
        return found[1] if found else "gone"

    @property
    def starts(self) -> int:
        """How often it was put back into the queue."""
        found = re.search(r"Restarts=(\d+)", self.facts)
        return int(found[1]) if found else 0

    @property
    def seconds(self) -> int:
        """That it has run in this start."""
        found = re.search(r"RunTime=(\d+):(\d+):(\d+)", self.facts)
        assert found
        return sum(int(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))

    @property
    def log(self) -> str:
        return (self.folder / RUN / "logs" / f"{self.id}.log").read_text()

    @property
    def steps(self) -> int:
        metrics = self.folder / RUN / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"job {self.id} is {self.state}, not {what}:\n{self.log[-4000:]}"
            time.sleep(0.2)

    def take_steps(self, number: int = 2) -> None:
        """Wait until it runs and has taken some steps in this start."""
        before = self.steps
        self.wait(f"at step {before + number}", lambda: self.state == "RUNNING" and self.steps >= before + number)

    def come_back(self, starts: int) -> None:
        """Wait until it has been put back so often, and runs again."""
        self.wait("requeued", lambda: self.starts == starts)


def set_pace(folder: Path, seconds: float) -> None:
    """What every step takes from now on."""
    draft = folder / "pace.draft"
    draft.write_text(str(seconds))
    draft.replace(folder / "pace")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_undisturbed(rank: int, world_size: int, folder: str) -> None:
    os.chdir(folder)
    run_training(load_config("run.yaml", ["output_dir=undisturbed"]))


def tell(job: Job) -> None:
    slurm(job.environment, "scancel", "--signal=USR1", job.id)


def preempt(job: Job) -> None:
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    assert slurm(job.environment, *urgent, "--wrap=true").isdigit()


def end_its_time(job: Job) -> None:
    # Whole minutes are all that SLURM knows, and it looks at the time every half of one.
    minutes = -(-(job.seconds + 45) // 60)
    slurm(job.environment, "scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")


STOPS = (tell, preempt, end_its_time)


@pytest.mark.timeout(900)  # most of it waits for SLURM
def test_a_run_survives_what_a_cluster_does_to_it(tmp_path: Path, environment: dict[str, str]) -> None:
    """Each stop has the job save and put itself back; then a rank is killed; another job ends as if nothing was."""
    make_inputs(tmp_path)
    steps = 160  # more than there is time for until the last stop
    tree = run_tree(
        tmp_path,
        RUN,
        strategy="ddp",
        loss={"function": "own_losses:paced", "matryoshka_dims": None},
        training={"max_steps": steps, "save_steps": 1000},
        slurm={
            "partition": "main",
            "ranks_per_node": 2,
            "cpus_per_task": 2,
            "time": 10,
            "signal_seconds": 10,
            "options": [f"--comment={COMMENT}"],
        },
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    set_pace(tmp_path, 1.0)
    job = Job(tmp_path, environment)
    assert f"Comment={COMMENT}" in job.facts
    for number, stop in enumerate(STOPS, 1):
        job.take_steps()
        stop(job)
        job.come_back(number)
    assert job.log.count("back into the queue, to continue from step-") == len(STOPS)
    assert job.log.count("saving step") == len(STOPS)
    assert "could not be requeued" not in job.log
    assert "SIGTERM" not in job.log  # the signal came before the end did

    job.take_steps()
    rank = json.loads((tmp_path / RUN / "heartbeats" / "rank-00003.json").read_text())
    os.kill(rank["pid"], signal.SIGKILL)
    job.wait("FAILED", lambda: job.state == "FAILED")
    assert json.loads((tmp_path / RUN / "status.json").read_text())["state"] == "failed"

    set_pace(tmp_path, 0.0)
    again = Job(tmp_path, environment)
    again.wait("COMPLETED", lambda: again.state == "COMPLETED")
    assert [again.starts, len(losses(tmp_path / RUN))] == [0, steps]
    # Each rank has a log of its own, and rank 0 alone speaks in the job's.
    logs = tmp_path / RUN / "logs" / again.id
    assert sorted(path.name for path in logs.iterdir()) == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert again.log.count("continuing from step-") == 1

    run_ranks(run_undisturbed, 4, str(tmp_path), seconds=500)
    assert losses(tmp_path / RUN) == losses(tmp_path / "undisturbed")
