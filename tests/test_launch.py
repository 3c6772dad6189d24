"""Launching: the command for each strategy, one line for a mistake of any rank, and no process left behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import WriteRunFile
from own_lines import noise
from tiny_runs import make_inputs, run_tree

from farnear import outcome, resources
from farnear.cli import train_command
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.launching import local, supervision
from farnear.launching.local import accelerate_command, launch, python_command
from farnear.launching.supervision import supervise
from farnear.outcome import OUTCOME_FILE, read_outcome, tell
from farnear.run_folder import RunFolder, check_start, claimed
from farnear.status import read_status, write_status

ROOT = Path(__file__).resolve().parents[1]
RunProgram = Callable[..., list[str]]


@pytest.fixture
def program(tmp_path: Path) -> RunProgram:
    """Writes a Python program and returns the command that runs it."""

    def write(*lines: str) -> list[str]:
        path = tmp_path / "program.py"
        imports = "import os, signal, subprocess, sys, time\nfrom farnear.errors import UserError\n"
        path.write_text(imports + "from farnear.outcome import tell\n" + "\n".join(lines))
        return [sys.executable, str(path)]

    return write


def _ends(process: psutil.Process, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


# The command


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_command_is_the_one_of_the_readme(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    shown, run = accelerate_command(strategy, ["my run.yaml", "a=[b c]"], None, None)
    assert shlex.join(shown) == (
        f"accelerate launch --config_file accelerate_configs/{strategy}.yaml launch/train.py 'my run.yaml' 'a=[b c]'"
    )
    assert run == [sys.executable, "-m", "accelerate.commands.launch", *shown[2:]]


def test_the_command_works_from_another_folder_and_without_an_active_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    shown, _ = accelerate_command("ddp", ["run.yaml"], None, 3)
    assert shown[0] == str(Path(sys.executable).parent / "accelerate")
    assert shown[2:] == [
        *("--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), "--num_processes", "3"),
        *(str(ROOT / "launch" / "train.py"), "run.yaml"),
    ]
    assert all(Path(word).is_file() for word in (shown[0], shown[3], shown[6]))
    assert python_command(["run.yaml"])[0] == [sys.executable, "-u", shown[6], "run.yaml"]


def test_resources_are_the_working_folders_own_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resources.resource("ds_configs/zero2.json") == ROOT / "ds_configs" / "zero2.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").touch()
    assert resources.resource("ds_configs/zero2.json").resolve() == tmp_path / "ds_configs" / "zero2.json"
    assert resources.resource(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize(
    ("keys", "options", "expected"),
    [
        ({}, {}, "ddp.yaml LAUNCH RUN"),
        ({"num_processes": 2}, {}, "ddp.yaml --num_processes 2 LAUNCH RUN"),
        ({"num_processes": 2}, {"num_processes": 3}, "ddp.yaml --num_processes 3 LAUNCH RUN num_processes=3"),
        ({"strategy": "zero3"}, {"resume": "auto"}, "zero3.yaml LAUNCH RUN --resume auto"),
        (
            {"strategy": "zero3"},
            {"overrides": ["strategy=zero1", "seed=1"]},
            "zero1.yaml LAUNCH RUN strategy=zero1 seed=1",
        ),
    ],
)
def test_launch_runs_the_accelerate_config_of_the_strategy(
    keys: dict[str, object],
    options: dict[str, object],
    expected: str,
    write_run_file: WriteRunFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: started.append(command) or 0)
    run_file = write_run_file(**keys)
    assert launch(run_file, **{"overrides": [], **options}) == 0  # type: ignore[arg-type]
    [command] = started
    words = expected.replace("LAUNCH", "train.py").replace("RUN", "run.yaml").split()
    assert [Path(word).name for word in command[4:]] == words
    hardware, shown = capsys.readouterr().out.splitlines()
    assert hardware.startswith("on no GPU, ")
    assert shlex.split(shown)[2:] == command[3:]


def test_launch_runs_strategy_single_without_a_launcher(
    write_run_file: WriteRunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: started.append(command) or 0)
    run_file = write_run_file(strategy="single")
    assert launch(run_file, ["seed=3"]) == 0
    assert [Path(word).name for word in started[0][1:]] == ["-u", "train.py", "run.yaml", "seed=3"]
    with pytest.raises(UserError, match="single starts one process without accelerate"):
        launch(run_file, [], config_file=ROOT / "accelerate_configs" / "ddp.yaml")
    with pytest.raises(UserError, match="single is one process, but num_processes is 2"):
        launch(run_file, [], num_processes=2)


def test_launch_says_that_a_model_is_no_folder_here(
    write_run_file: WriteRunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    launch(write_run_file(model={"name_or_path": "runs/tiny"}), [])
    assert "there is no folder runs/tiny; looking" in capsys.readouterr().out
    launch(write_run_file(model={"name_or_path": "someone/tiny"}), [])
    assert "there is no folder" not in capsys.readouterr().out


def test_launch_refuses_what_cannot_start(
    write_run_file: WriteRunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: pytest.fail("processes were started"))
    with pytest.raises(UserError, match=r"accelerate config .*my.yaml cannot be read \(No such file"):
        launch(write_run_file(), [], config_file=tmp_path / "my.yaml")
    with pytest.raises(UserError, match="did you mean 'seed'"):
        launch(write_run_file(sed=1), [])
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="holds checkpoints up to step-00000010"):
        launch(write_run_file(), [])


def test_a_run_is_neither_started_over_nor_resumed_from_nothing(tmp_path: Path) -> None:
    check_start(tmp_path, None)
    check_start(tmp_path, "auto")
    with pytest.raises(UserError, match=r"no checkpoint in .* drop --resume to start, or say --resume auto"):
        check_start(tmp_path, "newest")
    (tmp_path / "checkpoints" / "step-00000020.unfinished").mkdir(parents=True)
    check_start(tmp_path, None)
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    check_start(tmp_path, "auto")
    check_start(tmp_path, "newest")
    with pytest.raises(UserError, match=r"up to step-00000010.* --resume, or set another output_dir"):
        check_start(tmp_path, None)


def test_what_a_run_would_replace_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# with comments\n")
    with pytest.raises(UserError, match=r"holds run\.yaml, but is no run folder.* set another output_dir"):
        check_start(tmp_path, "auto")
    (tmp_path / "run.lock").touch()
    check_start(tmp_path, "auto")
    (tmp_path / "summary.json").touch()
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        check_start(tmp_path, None)


# One line for a mistake of any rank


def test_ranks_that_meet_the_same_mistake_tell_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(message: str, environment: dict[str, str]) -> str:
        tell(UserError(message), environment)
        return capsys.readouterr().err

    monkeypatch.setattr(outcome, "SECONDS_TO_BE_ENDED", 0)
    ranks = [{"TORCHELASTIC_ERROR_FILE": str(tmp_path / str(rank) / "error.json")} for rank in range(3)]
    assert told("no shards", ranks[1]) == "farnear: error: no shards\n"
    assert told("no shards", ranks[0]) == ""
    assert told("broken page", ranks[2]) == "farnear: error: broken page\n"
    assert told("no shards", {}) == "farnear: error: no shards\n"
    # farnear launch prints the first one itself, at the end.
    file = tmp_path / "outcome.json"
    watched = [{**rank, OUTCOME_FILE: str(file)} for rank in ranks]
    assert told("no model", watched[0]) == ""
    assert told("no model", watched[1]) == ""
    assert told("broken page", watched[2]) == "farnear: error: broken page\n"
    assert str(read_outcome(file)) == "no model"
    # Its folder goes with it.
    assert told("no model", {OUTCOME_FILE: str(tmp_path / "gone" / "outcome.json")}) == "farnear: error: no model\n"


def test_a_message_survives_the_way_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "SECONDS_TO_BE_ENDED", 0)
    file = tmp_path / "outcome.json"
    assert read_outcome(file) is None
    tell(RunStoppedError("loss is nan at step 3: “é”"), {OUTCOME_FILE: str(file)})
    error = read_outcome(file)
    assert error is not None
    assert (str(error), error.exit_code) == ("loss is nan at step 3: “é”", 1)
    assert json.loads(file.read_text())["exit_code"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


# No process left behind


def test_supervise_gives_the_exit_code(program: RunProgram, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(program("print('trained')")) == 0
    assert supervise(program("sys.exit(3)")) == 3
    assert supervise(program("os.kill(os.getpid(), signal.SIGKILL)")) == 1
    output = capfd.readouterr()
    assert output.out == "trained\n"
    assert output.err.splitlines() == [
        "farnear: a process failed; the first error above says why",
        "farnear: a process was killed by SIGKILL (out of memory?)",
    ]


def test_supervise_ends_what_takes_too_long(program: RunProgram) -> None:
    command = program("subprocess.Popen(['sleep', '60'])", "time.sleep(60)")
    with pytest.raises(UserError, match="did not end within 1 s"):
        supervise(command, seconds=1.0)
    assert not [process for process in psutil.Process().children(recursive=True) if "sleep" in process.cmdline()]


def test_supervise_ends_every_process_after_a_mistake(
    program: RunProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher with two ranks in sessions of their own: one fails, the other waits for it, deaf to SIGTERM."""
    monkeypatch.setattr(supervision, "SECONDS_FROM_SIGTERM_TO_SIGKILL", 1.0)
    command = program(
        "if len(sys.argv) == 1:",
        "    ranks = [subprocess.Popen([sys.executable, __file__, str(r)], start_new_session=True) for r in range(2)]",
        "    sys.exit(max(rank.wait() for rank in ranks))",
        f"open({str(tmp_path)!r} + '/pid' + sys.argv[1], 'w').write(str(os.getpid()))",
        "if sys.argv[1] == '0':",
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "    time.sleep(60)",
        f"while not os.path.exists({str(tmp_path)!r} + '/pid0'): time.sleep(0.01)",
        "time.sleep(0.5)",
        "tell(UserError('rank 1 has no GPU'))",
    )
    started = time.monotonic()
    with pytest.raises(UserError, match="rank 1 has no GPU") as caught:
        supervise(command)
    assert time.monotonic() - started < 10
    assert caught.value.exit_code == 2
    for rank in range(2):
        pid = int((tmp_path / f"pid{rank}").read_text())
        assert not psutil.pid_exists(pid) or _ends(psutil.Process(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_launcher_and_ranks(number: signal.Signals, program: RunProgram, tmp_path: Path) -> None:
    command = program(
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)",
        f"open({str(tmp_path)!r} + '/pid.part', 'w').write(str(child.pid))",
        f"os.rename({str(tmp_path)!r} + '/pid.part', {str(tmp_path)!r} + '/pid')",
        "time.sleep(60)",
    )
    supervisor = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # Whatever runs the tests may ignore signals, and what is ignored is inherited.
            f"import signal, sys; from farnear.launching.supervision import SIGNALS_TO_END_ON, supervise\n"
            f"for number in SIGNALS_TO_END_ON: signal.signal(number, signal.SIG_DFL)\n"
            f"sys.exit(supervise({command}))",
        ],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        rank = psutil.Process(int((tmp_path / "pid").read_text()))
        # A terminal sends Ctrl-C to the whole group, others send to the process that they started.
        os.killpg(supervisor.pid, number) if number == signal.SIGINT else supervisor.send_signal(number)
        _, text = supervisor.communicate(timeout=20)
    finally:
        supervisor.kill()
    assert supervisor.returncode == 128 + number
    assert text == f"farnear: stopped by {number.name}; no process is left\n"
    assert _ends(rank, seconds=0.5)
    assert not list(tmp_path.glob("farnear-*"))


def test_a_save_that_is_asked_for_before_there_are_ranks_is_a_stop_in_good_order(
    program: RunProgram, tmp_path: Path, write_run_file: WriteRunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = program("os.kill(os.getppid(), signal.SIGUSR1)", "time.sleep(60)")
    with pytest.raises(RunInterruptedError, match="SIGUSR1 before the training began, with nothing to save"):
        supervise(command)
    monkeypatch.setattr(local, "python_command", lambda _: (["shown"], command))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.lock.touch()
    # What a start before has left says nothing of this one.
    folder.status.write_text(json.dumps({"state": "stopped", "time": "2020-01-01T00:00:00Z"}))
    with pytest.raises(RunInterruptedError):
        launch(write_run_file(strategy="single"), [])
    status = read_status(RunFolder(tmp_path / "run"))
    assert status is not None
    assert (status["state"], status["exit_code"], status["checkpoint"]) == ("stopped", 75, None)


def test_ranks_that_have_nothing_left_to_save_are_not_waited_for(program: RunProgram) -> None:
    """A signal is passed on to a rank that hangs, while the run has failed on another machine."""
    command = program(
        "from farnear.outcome import announce",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "announce()",
        "os.kill(os.getppid(), signal.SIGTERM)",
        "time.sleep(60)",
    )
    started = time.monotonic()
    assert supervise(command, has_failed=lambda: True) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5
    started = time.monotonic()
    assert supervise(command, seconds=3) == 128 + signal.SIGTERM
    assert time.monotonic() - started > 3


def test_a_killed_launcher_takes_its_child_along(program: RunProgram, tmp_path: Path) -> None:
    command = program(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.')", "time.sleep(60)")
    supervisor = subprocess.Popen(
        [sys.executable, "-c", f"from farnear.launching.supervision import supervise; supervise({command})"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("."):
            time.sleep(0.05)
        child = psutil.Process(int((tmp_path / "pid").read_text().rstrip(".")))
    finally:
        supervisor.kill()
        supervisor.wait()
    assert _ends(child, seconds=2.0)


def test_a_rank_of_torchrun_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents: list[int] = []
    monkeypatch.setattr("farnear.processes.end_with_parent", parents.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    # A shell that started a training by hand may be left.
    assert train_command([str(tmp_path / "none.yaml")]) == 2
    assert parents == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert train_command([str(tmp_path / "none.yaml")]) == 2
    assert parents == [os.getppid()]


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    threads = [local.variables_of_ranks(ranks, has_gpus=True)["OMP_NUM_THREADS"] for ranks in (1, 3, 16, 32)]
    assert threads == ["16", "5", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert local.variables_of_ranks(2, has_gpus=False) == {
        "OMP_NUM_THREADS": "7",
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "INFO",
    }


def test_a_killed_torchrun_takes_its_ranks_along(tmp_path: Path) -> None:
    rank = (
        "import os, time; from farnear.processes import end_with_parent; end_with_parent(os.getppid()); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.kill()
        parent.wait()
    assert _ends(child, seconds=2.0)


def test_a_signal_that_nohup_ignores_stays_ignored(program: RunProgram) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervise(program("os.kill(os.getppid(), signal.SIGHUP)", "time.sleep(0.3)")) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


# Real launches


def test_a_rank_that_fails_alone_is_told_without_torchruns_table(
    program: RunProgram, capfd: pytest.CaptureFixture[str]
) -> None:
    [_, script] = program("if os.environ['RANK'] == '1': tell(UserError('broken page'))", "time.sleep(60)")
    _, command = accelerate_command("ddp", [], None, 2)
    with pytest.raises(UserError, match="broken page"):
        supervise([*command[:-1], script])
    assert capfd.readouterr().err == ""


def test_accelerate_alone_shows_the_line_once(program: RunProgram) -> None:
    [_, script] = program("tell(UserError('no shards in ' + sys.argv[1]))", "sys.exit(2)")
    _, command = accelerate_command("zero2", [], None, 2)
    environment = {key: value for key, value in os.environ.items() if key != OUTCOME_FILE}
    ended = subprocess.run([*command[:-1], script, "a b"], env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert ended.stderr.count("farnear: error: no shards in a b\n") == 1


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of more steps than any test waits for."""
    folder = make_inputs(tmp_path_factory.mktemp("long"))
    tree = run_tree(folder, "run", strategy="ddp", training={"max_steps": 3000, "save_steps": 1000})
    tree["data"]["dataloader_num_workers"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


def _launched(folder: Path) -> "subprocess.Popen[str]":
    """A launch on two ranks that has taken some steps."""
    words = ["launch", str(folder / "run.yaml"), "--num_processes", "2", "--resume", "auto"]
    program = (
        "import signal, sys; from farnear.cli import main\n"
        # Whatever runs the tests may ignore signals, and what is ignored is inherited.
        "for number in (signal.SIGINT, signal.SIGUSR1): signal.signal(number, signal.SIG_DFL)\n"
        f"sys.exit(main({words}))"
    )
    before = _steps(folder)
    with open(folder / "printed.txt", "w") as printed:
        launched = subprocess.Popen([sys.executable, "-c", program], stdout=printed, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while _steps(folder) < before + 2 and time.monotonic() < deadline and launched.poll() is None:
        time.sleep(0.1)
    return launched


def _steps(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _pid(folder: Path, rank: int) -> int:
    return int(json.loads((folder / "run" / "heartbeats" / f"rank-{rank:05d}.json").read_text())["pid"])


@pytest.mark.parametrize("to", ["the launch", "a rank", "every process"])
def test_a_signal_has_the_ranks_save_and_the_launch_say_so(long_run: Path, to: str) -> None:
    launched = _launched(long_run)
    if to == "the launch":
        launched.send_signal(signal.SIGUSR1)
    elif to == "a rank":
        os.kill(_pid(long_run, 1), signal.SIGTERM)
    else:
        # So SLURM does: torchrun, data workers and the processes that they are forked from are no exceptions.
        everyone = psutil.Process(launched.pid).children(recursive=True)
        assert len(everyone) > 6
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)
    _, text = launched.communicate(timeout=60)
    steps = _steps(long_run)
    # torchrun's end is a SIGTERM to the ranks, which may be there first.
    name = {"the launch": "SIGUSR1", "a rank": "SIGTERM at rank 1", "every process": "SIG"}[to]
    assert launched.returncode == 75, text
    last = text.splitlines()[-1]
    assert last.startswith(f"farnear: stopped by {name}")
    assert last.endswith(f"after step {steps}, saved in step-{steps:08d}; the same command with --resume continues")
    if to != "every process":  # Python's own may complain when they are ended
        assert noise([*(long_run / "printed.txt").read_text().splitlines(), *text.splitlines()]) == []
    status = json.loads((long_run / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["checkpoint"]) == ("stopped", 75, f"step-{steps:08d}")
    assert (long_run / "run" / "checkpoints" / status["checkpoint"]).is_dir()
    assert not list((long_run / "run" / "heartbeats").iterdir())


def test_a_second_sigint_ends_a_launch_that_hangs(long_run: Path) -> None:
    launched = _launched(long_run)
    rank = psutil.Process(_pid(long_run, 0))
    rank.suspend()
    launched.send_signal(signal.SIGINT)
    assert launched.stderr is not None
    assert "SIGINT: all ranks save and stop; another Ctrl-C (SIGINT) ends them at once" in launched.stderr.readline()
    assert launched.poll() is None
    launched.send_signal(signal.SIGINT)
    _, text = launched.communicate(timeout=30)
    assert launched.returncode == 130
    assert "farnear: stopped by SIGINT; no process is left\n" in text
    assert _ends(rank, seconds=0.5)
    assert json.loads((long_run / "run" / "status.json").read_text())["state"] == "failed"


def test_a_launch_that_never_had_the_folder_does_not_speak_for_the_run_in_it(
    tmp_path: Path, write_run_file: WriteRunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(local, "supervise", lambda command, _, **__: 130)
    with claimed(folder):
        write_status(folder, "running", step=3)
        assert launch(write_run_file(), [], resume="auto") == 130
        status = read_status(folder)
        assert status is not None
        assert status["state"] == "running"
    assert launch(write_run_file(), [], resume="auto") == 130
    status = read_status(folder)
    assert status is not None
    assert (status["state"], status["reason"]) == ("failed", "a process of the launch ended with code 130")
