"""The fault campaign: break a training at every place where it can break, start it again, and compare.

    python benchmarks/faults.py              one scenario for every place and fault, ranks and strategies taking turns
    python benchmarks/faults.py --every      all of them, hours
    python benchmarks/faults.py --only "kill,write,1,zero2"

A scenario is a place (a phase of a save, of a step, or of an evaluation), a fault, a rank and a strategy. Two gloo
processes train a tiny model for seven steps, with a checkpoint every two and an evaluation every three. When the rank
comes to the place the fault happens there, in the real process: `farnear.training.watch` is told every place, and that
is where this script listens. The processes are started as torchrun would start them, by `launch/train.py`, and ended as
torchrun ends them when one fails. What is left is started again with --resume auto, and must reach its end with the
losses, gradient norms, evaluations, weights and moments of the run that nobody disturbed, bit for bit.

    kill        SIGKILL                            exception    an error in the training's or the saver's thread
    term, usr1  SIGTERM, SIGUSR1                   full         the checkpoints' disk (a small tmpfs) has no room left
    stop        SIGSTOP: frozen, but not gone      readonly     it is mounted read-only

The last line is JSON. `survived` counts the scenarios that ended in time, with the code that is documented, and came to
the same end; `lost_steps_over_last_published` is how many steps behind the newest published checkpoint a resume began,
`wrong_resumes` those that came to another end, `hangs` those that had to be killed, `worst_seconds_to_exit` the longest
time from a fault to the end of the last process (of those that the fault does end).

Mounting takes root: without it `full` and `readonly` are left out, and said so.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero2", "zero3")
FAULTS = ("kill", "term", "usr1", "exception", "full", "readonly", "stop")
STEP_PLACES = ("exchange", "pass one", "loss", "pass two", "reduce", "update")
SAVE_PLACES = ("save: copy", "draft", "write", "sync", "report")
MAIN_PLACES = ("manifest", "rename", "latest", "retain")  # of a save, on rank 0 alone
PLACES = (*SAVE_PLACES, *MAIN_PLACES, *STEP_PLACES, "evaluation")

STEPS, SAVE_STEPS, EVAL_STEPS = 7, 2, 3
# Between two saves; in a save that is not the first; in the evaluation of a step that is not saved for its own sake.
STEP_OF = {**dict.fromkeys(STEP_PLACES, 5), **dict.fromkeys((*SAVE_PLACES, *MAIN_PLACES), 4), "evaluation": 3}
TIMEOUT = 12.0
"""training.ddp_timeout: seconds within which frozen ranks must be found."""
SECONDS_TO_END = 90.0
SECONDS_OF_TORCHRUN = 5.0
"""From torchrun's SIGTERM to its SIGKILL; its own default is 30."""
DISK = "64m"

# What `launch/train.py` documents. A rank that is not the one with the fault may also be ended by torchrun.
EXIT_CODES = {
    "kill": {-9},
    "term": {75},
    "usr1": {75},
    "exception": {1},
    "full": {2, 0},
    "readonly": {2, 0},
    "stop": {-9},
}


@dataclass(frozen=True)
class Scenario:
    """What goes wrong, where, at which rank, under which strategy."""

    fault: str
    place: str
    rank: int
    strategy: str

    def __str__(self) -> str:
        return f"{self.fault},{self.place},{self.rank},{self.strategy}"


@dataclass
class Outcome:
    """How a scenario ended; ``wrong`` says what should not have been."""

    scenario: Scenario
    codes: list[int | None]
    seconds_to_exit: float = 0.0
    lost_steps: int = 0
    hung: bool = False
    wrong_resume: bool = False
    wrong: str = ""


# In the ranks


def rank_main(rank: int, port: int, folder: Path, words: Sequence[str], fault: Scenario | None) -> None:
    """What torchrun's child does, in a session of its own, with a fault in wait."""
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    out = open(folder / f"rank-{rank}.log", "ab", buffering=0)  # noqa: SIM115  (it is to stay)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        lie_in_wait(fault, folder)
    sys.argv = [str(ROOT / "launch" / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def lie_in_wait(fault: Scenario, folder: Path) -> None:
    """Have the fault happen when this rank comes to its place for the first time at its step."""
    from farnear.training.watch import Watch

    step = STEP_OF[fault.place]

    def happen() -> None:
        mark = folder / "fault"
        if not mark.exists():
            mark.write_text(str(time.time()))
            strike(fault.fault, folder)

    def at(watch: Watch, phase: str, **keys: Any) -> None:
        tell_at(watch, phase, **keys)
        if phase == fault.place and watch.place.step == step:
            happen()

    def saving(watch: Watch, phase: str, step_saved: int) -> None:
        tell_saving(watch, phase, step_saved)
        if phase == fault.place and step_saved == step:
            happen()

    tell_at, tell_saving = Watch.at, Watch.saving
    Watch.at, Watch.saving = at, saving  # type: ignore[method-assign, assignment]


def strike(fault: str, folder: Path) -> None:
    """The fault itself, in the process and the thread that met it."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
    disk = folder / "run" / "checkpoints"
    if fault == "stop":
        time.sleep(TIMEOUT / 10)  # mini-batches of a real run take longer than it is from one heartbeat to the next
    if fault in signals:
        os.kill(os.getpid(), signals[fault])
    elif fault == "exception":
        raise RuntimeError("a defect that the campaign has put here")
    elif fault == "full":
        with open(disk / "filler", "wb") as file:
            try:
                while True:
                    file.write(b"x" * 65536)
                    file.flush()
            except OSError:
                return
    else:
        deadline = time.monotonic() + 10
        # Busy while another rank has a file open.
        while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError("the disk cannot be made read-only")
            time.sleep(0.05)


# Around them


class Ranks:
    """Two ranks, ended as torchrun ends them."""

    def __init__(self, folder: Path, words: Sequence[str], fault: Scenario | None, port: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(target=rank_main, args=(rank, port, folder, words, fault)) for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> tuple[list[int | None], bool]:
        """Exit codes, and whether they had to be killed for taking too long."""
        deadline = time.monotonic() + seconds
        first_failure: float | None = None
        while any(process.is_alive() for process in self.processes):
            now = time.monotonic()
            if first_failure is None and any(process.exitcode for process in self.processes):
                first_failure = now
                for process in self.processes:
                    if process.is_alive():
                        process.terminate()
            if now > deadline or (first_failure is not None and now > first_failure + SECONDS_OF_TORCHRUN):
                for process in self.processes:
                    process.kill()
                for process in self.processes:
                    process.join()
                return [process.exitcode for process in self.processes], first_failure is None
            time.sleep(0.02)
        return [process.exitcode for process in self.processes], False


def run_tree(base: Path, folder: Path, strategy: str) -> dict[str, Any]:
    """The run file of every scenario."""
    return {
        "output_dir": str(folder / "run"),
        "strategy": strategy,
        "model": {"name_or_path": str(base / "base")},
        "data": {
            "train": str(base / "data" / "train-*.tar"),
            "eval": str(base / "data" / "eval-*.tar"),
            "tail": "carry",
            "dataloader_num_workers": 0,
        },
        "loss": {"matryoshka_dims": [32, 16]},
        "training": {
            "global_batch_size": 8,
            "mini_batch_size": 2,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "learning_rate": 1e-3,
            "ddp_timeout": TIMEOUT,
        },
        "evaluation": {"eval_steps": EVAL_STEPS, "per_device_eval_batch_size": 2, "eval_on_start": False},
    }


def make_base(base: Path) -> Path:
    """Drawn pages and a tiny model."""
    from farnear.ingest.synthetic import synthesise
    from farnear.model.tiny import save_tiny_model

    synthesise(base / "data", train_pairs=22, eval_pairs=8, seed=0, size=(64, 64))
    save_tiny_model(base / "base", texts=["Which page shows the red bar chart?"], hidden_size=32, num_layers=2)
    return base


def start(base: Path, folder: Path, strategy: str, fault: Scenario | None) -> Ranks:
    """Start or resume the run of a folder."""
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(base, folder, strategy)))
    return Ranks(folder, [str(run_file), "--resume", "auto"], fault, free_port())


def undisturbed(base: Path, strategy: str) -> dict[str, Any]:
    """The end of a run without a fault."""
    folder = base / f"undisturbed-{strategy}"
    folder.mkdir()
    codes, hung = start(base, folder, strategy, None).wait(SECONDS_TO_END)
    if hung or codes != [0, 0]:
        raise RuntimeError(f"the undisturbed run under {strategy} ended with {codes}:\n{log_of(folder)}")
    return end_of(folder)


def play(base: Path, scenario: Scenario, expected: dict[str, Any]) -> Outcome:
    """One scenario: fault, end, relaunch, comparison."""
    folder = Path(tempfile.mkdtemp(prefix="scenario-", dir=base))
    with small_disk(folder / "run" / "checkpoints", mounted=scenario.fault in ("full", "readonly")):
        codes, hung = start(base, folder, scenario.strategy, scenario).wait(SECONDS_TO_END)
        ended = time.time()
        outcome = Outcome(scenario, codes, hung=hung)
        if not (folder / "fault").exists():
            outcome.wrong = f"the fault did not happen; codes {codes}:\n{log_of(folder)}"
            return outcome
        went_on = codes == [0, 0]
        outcome.seconds_to_exit = 0.0 if went_on else ended - float((folder / "fault").read_text())
        if hung:
            outcome.wrong = f"it hung:\n{log_of(folder)}"
            return outcome
        if codes[scenario.rank] not in EXIT_CODES[scenario.fault] or (0 in codes and not went_on):
            outcome.wrong = f"it ended with {codes}:\n{log_of(folder)}"
            return outcome
        mend_disk(folder / "run" / "checkpoints", scenario.fault)
        newest = published_steps(folder)[-1:] or [0]
        if scenario.fault in ("term", "usr1") and newest[0] < len(records(folder / "run" / "metrics.jsonl")):
            outcome.wrong = f"steps were lost at a signal:\n{log_of(folder)}"
        (folder / "rank-0.log").rename(folder / "rank-0.first.log")
        codes, outcome.hung = start(base, folder, scenario.strategy, None).wait(SECONDS_TO_END)
        if outcome.hung or codes != [0, 0]:
            outcome.wrong = f"the relaunch ended with {codes}:\n{log_of(folder)}"
            return outcome
        outcome.lost_steps = newest[0] - resumed_from(folder)
        found = end_of(folder)
        different = [name for name in expected if expected[name] != found[name]]
        outcome.wrong_resume = bool(different)
        if different:
            outcome.wrong = f"{', '.join(different)} differ from the undisturbed run's"
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome


@contextmanager
def small_disk(folder: Path, *, mounted: bool) -> Iterator[None]:
    """A tmpfs at ``folder``, if one is wanted."""
    if not mounted:
        yield
        return
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mend_disk(folder: Path, fault: str) -> None:
    """What a person would do before starting again."""
    if fault == "full":
        (folder / "filler").unlink(missing_ok=True)
    elif fault == "readonly":
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        try:
            is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False
        return is_mounted and subprocess.run(["umount", folder], capture_output=True).returncode == 0


def end_of(folder: Path) -> dict[str, Any]:
    """What two runs that are the same have in common at their end."""
    run = folder / "run"
    steps = records(run / "metrics.jsonl")
    evaluations = records(run / "eval.jsonl")
    return {
        "losses": [(step["step"], step["loss"], step["grad_norm"], step["lr"]) for step in steps],
        "evaluations": [(one["step"], one["kind"], one["metrics"]) for one in evaluations],
        "best": (run / "best").read_text(),
        "state": {key: value.tobytes() for key, value in state_of(run / "checkpoints" / f"step-{STEPS:08d}").items()},
        "status": json.loads((run / "status.json").read_text())["state"],
    }


def state_of(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Whole flat tensors by KIND/PARAMETER, put together by this script's own code."""
    pieces: dict[str, list[tuple[int, np.ndarray[Any, Any]]]] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                kind, start_of_piece, name = key.split("/", 2)
                pieces.setdefault(f"{kind}/{name}", []).append((int(start_of_piece), file.get_tensor(key)))
    return {
        key: np.concatenate([piece for _, piece in sorted(found, key=lambda one: one[0])])
        for key, found in pieces.items()
    }


def resumed_from(folder: Path) -> int:
    """The step that the relaunch said it continued from; 0 where it started anew."""
    lines = (folder / "rank-0.log").read_text().splitlines()
    said = [line for line in lines if line.startswith("continuing from step-")]
    return int(said[-1].split("step-")[1][:8]) if said else 0


def published_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, in order."""
    found = (folder / "run" / "checkpoints").glob("step-????????")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log_of(folder: Path) -> str:
    """The last words of both ranks."""
    logs = sorted(folder.glob("rank-*.log"))
    return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]) for path in logs)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scenarios(*, every: bool, faults: Sequence[str]) -> list[Scenario]:
    """One for every place and fault, or all."""
    found, strategies, ranks = [], cycle(STRATEGIES), cycle((0, 1, 1, 0))
    for place in PLACES:
        for fault in faults:
            of_place = (0,) if place in MAIN_PLACES else (0, 1)
            if every:
                found += [Scenario(fault, place, rank, strategy) for rank in of_place for strategy in STRATEGIES]
            else:
                rank = next(ranks)
                found.append(Scenario(fault, place, rank if rank in of_place else 0, next(strategies)))
    return found


def summed_up(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The last line."""
    return {
        "scenarios": len(outcomes),
        "survived": sum(not one.wrong for one in outcomes),
        "lost_steps_over_last_published": sum(one.lost_steps for one in outcomes),
        "wrong_resumes": sum(one.wrong_resume for one in outcomes),
        "hangs": sum(one.hung for one in outcomes),
        "worst_seconds_to_exit": round(max((one.seconds_to_exit for one in outcomes), default=0.0), 1),
    }


def play_all(base: Path, chosen: Sequence[Scenario]) -> list[Outcome]:
    """Every scenario, one after the other, told as they end."""
    multiprocessing.set_forkserver_preload(["torch", "sentence_transformers", "deepspeed", "farnear.training.run"])
    make_base(base)
    expected = {name: undisturbed(base, name) for name in dict.fromkeys(one.strategy for one in chosen)}
    outcomes = []
    for number, scenario in enumerate(chosen, 1):
        outcome = play(base, scenario, expected[scenario.strategy])
        outcomes.append(outcome)
        how = "survived" if not outcome.wrong else f"WRONG: {outcome.wrong}"
        codes, seconds = outcome.codes, outcome.seconds_to_exit
        print(f"{number:4}/{len(chosen)}  {scenario!s:36} codes {codes!s:10} {seconds:5.1f} s  {how}", flush=True)
    return outcomes


def main() -> int:
    """Run the campaign; 0 when all survived."""
    parser = argparse.ArgumentParser(description="Break a training everywhere, and see it come to the same end.")
    parser.add_argument("--every", action="store_true", help="all ranks and strategies for every place and fault")
    parser.add_argument("--only", help="one scenario: fault,place,rank,strategy")
    arguments = parser.parse_args()
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    faults = FAULTS
    if not can_mount():
        faults = tuple(fault for fault in FAULTS if fault not in ("full", "readonly"))
        print("LEFT OUT: full and readonly, as this process may not mount anything", flush=True)
    chosen = scenarios(every=arguments.every, faults=faults)
    if arguments.only:
        fault, place, rank, strategy = arguments.only.split(",")
        chosen = [Scenario(fault, place, int(rank), strategy)]
    with tempfile.TemporaryDirectory(prefix="farnear-faults-") as folder:
        os.environ["FARNEAR_CACHE"] = f"{folder}/cache"
        outcomes = play_all(Path(folder), chosen)
    figures = summed_up(outcomes)
    print(json.dumps({**figures, "wrong": [asdict(one) for one in outcomes if one.wrong]}))
    return 0 if figures["survived"] == figures["scenarios"] else 1


if __name__ == "__main__":
    sys.exit(main())
