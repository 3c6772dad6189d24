"""Trackers: what they are told, how a resumed run goes on in them, and that none of them can hurt a training."""

import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import tracking
from conftest import WriteRunFile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_runs import make_inputs, run_config, run_tree

from farnear.cli import main
from farnear.config import load_config
from farnear.errors import UserError
from farnear.launching import checks_machine, foresee, local
from farnear.launching.findings import Subject
from farnear.parallel import trackers as trackers_module
from farnear.parallel.trackers import Told, Trackers
from farnear.parallel.world import World
from farnear.run_folder import RunFolder
from farnear.training.run import train_in

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("trackers"))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What a package `trackio` that is as good as installed is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(
        "import types\n"
        "told, config = [], types.SimpleNamespace(update=lambda values, **_: told.append(('config', values)))\n"
        "def init(**how):\n"
        "    told.append(('init', how))\n"
        "    log = lambda values, step: told.append((step, values))\n"
        "    return types.SimpleNamespace(name=how['name'], log=log, finish=lambda: told.append(('finish',)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    import trackio

    yield trackio.told
    del sys.modules["trackio"]


def started(folder: Path, *names: str, step: int = 0, told: Told | None = None, **config: Any) -> Trackers:
    trackers = Trackers()
    folder.mkdir(exist_ok=True)
    trackers.start(names, RunFolder(folder), config, step, told or Told())
    return trackers


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def steps_of(folder: Path, tag: str) -> list[int]:
    return [event.step for event in events_of(folder).Scalars(tag)]


def hyper_parameters(folder: Path) -> dict[str, Any]:
    [content] = [
        content
        for tag, content in events_of(folder).PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    ]
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


# What they are told


def test_a_run_writes_curves_and_its_run_file_and_asks_no_network(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And after a resume as if nothing had been, with the steps that were trained twice as they came out last."""

    def refuse(_: socket.socket, address: Any) -> None:
        raise AssertionError(f"somebody asks {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    keys: dict[str, Any] = {
        "data": {"eval": str(inputs / "data" / "eval-*.tar")},
        "evaluation": {"eval_steps": 2},
    }
    run = inputs / "run"
    train_in(ALONE, run_config(inputs, "run", **keys, training={"max_steps": 5, "save_steps": 2}))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    assert steps_of(run, "eval_all/64/ndcg@10") == [0, 5]
    again = run_config(inputs, "run", **keys, training={"max_steps": 6, "save_steps": 2})
    train_in(ALONE, again, "newest")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(event.step, event.value) for event in events_of(run).Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert steps_of(run, "seconds/pass_one") == [1, 2, 3, 4, 5, 6]
    assert steps_of(run, "eval/16/mrr@10") == [2, 4, 6]
    assert steps_of(run, "eval_all/64/ndcg@10") == [0, 6]
    # A run that ends once more at its last step measures it once more, and is heard once.
    train_in(ALONE, again, "newest")
    assert steps_of(run, "eval_all/64/ndcg@10") == [0, 6]
    told = hyper_parameters(run)
    assert told["training/learning_rate"] == 1e-3
    assert told["loss/matryoshka_dims"] == "[64, 16]"
    assert told["data/exclude"] == "null" or told["data/exclude"] == "[]"
    # One that starts anew has curves of its own.
    for path in (run / "checkpoints", run / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_in(ALONE, run_config(inputs, "run", training={"max_steps": 1}))
    assert steps_of(run, "loss") == [1]


def test_any_run_file_can_be_told(tmp_path: Path, write_run_file: WriteRunFile) -> None:
    config = load_config(write_run_file()).model_dump(mode="json")
    with started(tmp_path / "run", "tensorboard", **config):
        pass
    told = hyper_parameters(tmp_path / "run")
    assert told["model/name_or_path"] == "some/model" and told["training/report_to"] == '["tensorboard"]'
    assert len(told) > 80


def test_a_tracker_that_is_installed_is_told_once(
    tmp_path: Path, stand_in: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with started(run, "trackio", "tensorboard", seed=1) as trackers:
        trackers.log_step({"step": 1, "loss": 2.0, "left_out": None, "skips": True, "seconds": {"data": 0.5}})
        trackers.log_step({"step": 2, "loss": float("nan"), "lr": 1.0})
        trackers.log_evaluation("during", {"64": {"ndcg@10": 0.5}}, 2)
    assert stand_in == [
        ("init", {"project": "farnear", "name": "run", "resume": "never"}),
        ("config", {"seed": 1}),
        (1, {"loss": 2.0, "seconds/data": 0.5}),
        (2, {"lr": 1.0}),
        (2, {"eval/64/ndcg@10": 0.5}),
        ("finish",),
    ]
    stand_in.clear()
    told = Told(2, frozenset({("during", 2)}))
    with started(run, "trackio", "tensorboard", step=1, told=told, seed=1) as trackers:
        for step in (2, 3):
            trackers.log_step({"step": step, "loss": 1.0})
            trackers.log_evaluation("during", {"64": {"ndcg@10": 0.6}}, step)
    assert stand_in == [
        ("init", {"project": "farnear", "name": "run", "resume": "allow"}),
        (3, {"loss": 1.0}),
        (3, {"eval/64/ndcg@10": 0.6}),
        ("finish",),
    ]
    assert [(event.step, event.value) for event in events_of(run).Scalars("loss")] == [(1, 2.0), (2, 1.0), (3, 1.0)]
    # One that joins a run late is told all that is to come.
    stand_in.clear()
    (run / "trackers.json").unlink()
    with started(run, "trackio", step=1, told=told) as trackers:
        trackers.log_step({"step": 2, "loss": 1.0})
    assert (2, {"loss": 1.0}) in stand_in
    assert capsys.readouterr().out == ""


# What they may do


class Onlooker(tracking.GeneralTracker):
    """A tracker that does what a test wants."""

    name, requires_logging_directory, tracker = "trackio", False, None
    steps: list[int]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps = []

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.steps.append(step or 0)


def test_a_tracker_that_fails_is_told_of_once_and_the_training_goes_on(
    inputs: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Onlooker):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            if step == 2:
                raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers_module.LOGGER_TYPE_TO_CLASS, "trackio", Failing)
    training = {"max_steps": 4, "report_to": ["trackio", "tensorboard"]}
    train_in(ALONE, run_config(inputs, "fails", training=training))
    out = capsys.readouterr().out
    assert out.count("training.report_to: trackio is left out from here on (ConnectionError: no route to host)") == 1
    assert steps_of(inputs / "fails", "loss") == [1, 2, 3, 4]
    assert len((inputs / "fails" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_cannot_start_stops_a_new_run_and_no_resumed_one(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unreachable(Onlooker):
        def start(self) -> None:
            raise OSError("the server is down")

    monkeypatch.setitem(trackers_module.LOGGER_TYPE_TO_CLASS, "trackio", Unreachable)
    with pytest.raises(UserError, match=r"report_to: trackio cannot start \(OSError: the server is down\); mend"):
        started(tmp_path / "run", "trackio")
    with started(tmp_path / "run", "trackio", step=3) as trackers:
        trackers.log_step({"step": 4, "loss": 1.0})
    assert "trackio is left out from here on (OSError: the server is down)" in capsys.readouterr().out


def test_a_slow_tracker_keeps_nobody_waiting(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = threading.Event()

    class Slow(Onlooker):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            go_on.wait(60)

    monkeypatch.setitem(trackers_module.LOGGER_TYPE_TO_CLASS, "trackio", Slow)
    monkeypatch.setattr(trackers_module, "_WAITING", 20)
    before = time.monotonic()
    full, late = started(tmp_path / "full", "trackio"), started(tmp_path / "late", "trackio")
    for step in range(1, 50):
        full.log_step({"step": step, "loss": 1.0})
    assert "it is 20 records behind" in capsys.readouterr().out
    late.log_step({"step": 1, "loss": 1.0})
    late.close(0.2)
    assert "it has not taken everything within 0 s" in capsys.readouterr().out
    full.close(10.0)
    assert time.monotonic() - before < 10
    go_on.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its own thread
def test_a_tensorboard_whose_disk_is_full_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer import record_writer

    with started(tmp_path / "run", "tensorboard") as trackers:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(record_writer.RecordWriter, "write", full)
        for step in range(1, 20):
            trackers.log_step({"step": step, "loss": 1.0})
            time.sleep(0.01)
    assert capsys.readouterr().out.count("tensorboard is left out from here on (OSError: [Errno 28] No space") == 1


# Which are installed


def test_a_tracker_that_is_not_installed_is_told_before_anything_starts(
    inputs: Path,
    write_run_file: WriteRunFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: pytest.fail("processes were started"))
    # A folder that a tracker has left in the working directory is no package.
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    wanted = "training.report_to names mlflow, which is not installed; pip install mlflow, or take it out"
    run_file = write_run_file(training={"report_to": "mlflow"})
    assert main(["launch", str(run_file)]) == 2
    assert wanted in capsys.readouterr().err
    findings = checks_machine.versions(Subject(load_config(run_file), [str(run_file)], None, None, 1.0))
    assert ("FAIL", wanted.partition("; ")[0]) in [(finding.level, finding.what) for finding in findings]
    assert foresee._tracker(load_config(run_file)) == wanted
    with pytest.raises(UserError, match="mlflow, which is not installed"):
        train_in(ALONE, run_config(inputs, "missing", training={"report_to": "mlflow"}))
    assert not (inputs / "missing" / "metrics.jsonl").exists()
    (inputs / "unknown.yaml").write_text(yaml.safe_dump(run_tree(inputs, "unknown", training={"report_to": "tb"})))
    assert main(["launch", str(inputs / "unknown.yaml")]) == 2
    assert "names 'tb', which accelerate does not know; choose from aim, clearml" in capsys.readouterr().err


def test_a_run_goes_without_a_tensorboard_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers_module, "is_installed", lambda name: False)
    with started(tmp_path / "run", "tensorboard") as trackers:
        trackers.log_step({"step": 1, "loss": 1.0})
    assert "tensorboard is not installed, and is left out; pip install tensorboard" in capsys.readouterr().out
    assert not (tmp_path / "run" / "tensorboard").exists()
