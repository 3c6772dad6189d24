"""`farnear submit` without a cluster: what the script says, how early its signal comes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRunFile

from farnear.cli import main
from farnear.config import load_config, parse_config
from farnear.errors import UserError
from farnear.launching.slurm import (
    LEAST_LEAD_SECONDS,
    UNKNOWN_LEAD_SECONDS,
    job_script,
    lead_seconds,
    seconds_of,
    submit,
)
from farnear.run_folder import RunFolder
from farnear.status import write_status

ROOT = Path(__file__).resolve().parents[1]


def script(*overrides: str, nodes: int = 2, **keys: Any) -> str:
    tree = {"output_dir": "runs/my run", "model": {"name_or_path": "m"}, "data": {"train": "a.tar"}, **keys}
    return job_script(parse_config(tree), ["run file.yaml", *overrides], nodes)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_the_script_asks_for_what_the_run_file_says() -> None:
    slurm = {
        "account": "vdr",
        "partition": "gpu",
        "qos": "high",
        "constraint": "h100",
        "gres": "nvme:1",
        "gpus_per_node": 8,
        "cpus_per_task": 64,
        "mem": "400G",
        "time": "1-12:00:00",
        "signal_seconds": 240,
        "options": ["--exclusive", "--mail-type=END"],
    }
    text = script(slurm=slurm, training={"global_batch_size": 256}, nodes=4)
    assert directives(text) == [
        *("--job-name=farnear-my-run", "--nodes=4", "--ntasks-per-node=1"),
        *("--account=vdr", "--partition=gpu", "--qos=high", "--constraint=h100", "--gres=nvme:1"),
        *("--gpus-per-node=8", "--cpus-per-task=64", "--mem=400G", "--time=1-12:00:00", "--signal=USR1@240"),
        *("--requeue", "--open-mode=append", f"--chdir={os.getcwd()}"),
        *(f'--output="{os.path.abspath("runs/my run")}/logs/%j.log"', "--exclusive", "--mail-type=END"),
    ]
    assert "\nranks_per_node=8\n" in text
    # Only what was asked for: a cluster without accounts or GPUs knows no such options.
    assert not [line for line in directives(script()) if "account" in line or "gpu" in line]
    assert "\nranks_per_node=${SLURM_GPUS_ON_NODE:-1}\n" in script()


def test_words_reach_the_nodes_as_they_were_typed(tmp_path: Path) -> None:
    text = script("loss.matryoshka_dims=[64, 16]", "output_dir=it's", slurm={"container": "img", "setup": "module x"})
    settings = text[text.index("# What this run") : text.index("# Whatever the lines above")]
    assert "module x\n" in settings
    assert "activate" not in settings
    (tmp_path / "settings.sh").write_text(settings.replace("module x", "SLURM_JOB_ID=7"))
    shown = 'printf "%s\\n" "$@" "$log_dir" "${container[@]}"'
    words = subprocess.run(
        ["bash", "-c", f". ./settings.sh; {shown}"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    here = os.getcwd()
    assert words == [
        *("run file.yaml", "loss.matryoshka_dims=[64, 16]", "output_dir=it's"),
        f"{here}/runs/my run/logs/7",
        *("--container-image=img", f"--container-mounts={here}:{here}", f"--container-workdir={here}"),
    ]


def test_options_are_quoted_as_sbatch_reads_them() -> None:
    """A real one does in test_slurm.py."""
    text = script(output_dir="it's 100%", slurm={"options": ['--comment=a "b" \\ $c', "--exclusive"]})
    assert '--comment="a \\"b\\" \\\\ $c"' in directives(text)
    assert f'--output="{os.getcwd()}/it\'s 100%%/logs/%j.log"' in directives(text)
    assert "--exclusive" in directives(text)


def test_the_script_is_one_that_bash_and_a_person_can_read() -> None:
    text = script("seed=1", slurm={"setup": "module load cuda\nsource env.sh\n", "offline": True})
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "#   made by farnear submit, for 2 nodes\n" in text
    assert "\nmodule load cuda\nsource env.sh\nexport HF_HUB_OFFLINE=1\nset -- 'run file.yaml' seed=1\n" in text
    assert max(map(len, text.splitlines())) <= 160
    assert f"source {sys.prefix}/bin/activate\n" in script()


def test_the_signal_comes_as_early_as_saves_and_steps_have_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert lead_seconds(folder) == UNKNOWN_LEAD_SECONDS
    assert lead_seconds(folder, save_seconds=50.0) == 2 * 50 + 30
    assert lead_seconds(folder, save_seconds=0.1) == LEAST_LEAD_SECONDS

    def write(path: Path, *records: dict[str, Any]) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    write(folder.saves, {"step": 1, "seconds": 100.0}, {"step": 2, "seconds": 40.0})
    assert lead_seconds(folder, save_seconds=0.1) == 2 * 100 + 30
    write(folder.metrics, {"step": 1, "seconds": {"data": 1.0, "pass_one": 9.0}})
    assert lead_seconds(folder) == 2 * 110 + 30
    # What was slow long ago, and half a last line, do not count.
    write(folder.saves, {"step": 0, "seconds": 900.0}, *({"step": step, "seconds": 40.0} for step in range(1, 51)))
    with open(folder.saves, "a") as file:
        file.write('{"step": 51, "sec')
    assert lead_seconds(folder) == 2 * 50 + 30
    assert "--signal=USR1@130" in script(output_dir=str(tmp_path))
    # A short job keeps half of its time, and SLURM takes 65535 seconds at most.
    assert "--signal=USR1@60\n" in script(output_dir=str(tmp_path), slurm={"time": "00:02:00"})
    write(folder.saves, {"step": 1, "seconds": 1e9})
    assert lead_seconds(folder) == 65535
    for damaged in ("5\n[]\n{}\n", '{"seconds": "a"}\n', '{"seconds": NaN}\nnull\n', '{"seconds": {"data": "x"}}\n'):
        for path in (folder.saves, folder.metrics):
            path.write_text(damaged)
        assert lead_seconds(folder) == UNKNOWN_LEAD_SECONDS


def test_times_are_read_as_slurm_reads_them() -> None:
    times = ("90", "1:30", "24:00:00", "2-1", "2-01:30", "1-00:00:05")
    assert [seconds_of(time) for time in times] == [5400, 90, 86400, 176400, 178200, 86405]


@pytest.mark.parametrize(
    ("keys", "nodes", "message"),
    [
        ({"strategy": "single"}, 2, "strategy single is one process and has no use for 2 nodes"),
        (
            {"num_processes": 8, "slurm": {"gpus_per_node": 8}},
            2,
            "num_processes=8, but 2 nodes with 8 ranks each are 16",
        ),
        ({"slurm": {"gpus_per_node": 8}}, 16, "128 ranks would share 64 pairs"),
        ({"slurm": {"time": 5, "signal_seconds": 300}}, 1, r"signal_seconds is 300, and the whole job has 300 s"),
        ({"output_dir": "a\ntouch b"}, 1, "output_dir holds characters that no line of a script can"),
    ],
)
def test_a_run_that_cannot_be_spread_so_is_refused(
    keys: dict[str, Any], nodes: int, message: str, write_run_file: WriteRunFile
) -> None:
    with pytest.raises(UserError, match=message):
        submit(write_run_file(**keys), [], nodes=nodes, dry_run=True)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"time": "a day"}, r"slurm\.time: minutes, HH:MM:SS or D-HH:MM:SS, not 'a day'"),
        ({"options": ["exclusive"]}, "options of sbatch begin with a dash"),
        ({"account": "a\ntouch b"}, r"slurm\.account: a single line, not 'a\\ntouch b'"),
        ({"container_mounts": "/a:/a"}, "container_mounts is set, but container is not"),
        ({"gpus": 8}, r"slurm\.gpus is not a key of farnear: slurm\.gpus_per_node counts the GPUs of each node"),
        ({"gpu_per_node": 8}, r"unknown key 'slurm\.gpu_per_node'; did you mean 'slurm\.gpus_per_node'"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(slurm=slurm)


def test_times_need_no_quotes(write_run_file: WriteRunFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_file(slurm={"time": "TIME"})
    for written, given in (("24:00:00", "24:00:00"), ("90", "90"), ("2-00:00:00", "2-00:00:00"), ("1:30", "1:30")):
        path.write_text(path.read_text().replace("TIME", written))
        assert main(["submit", str(path), "--dry-run", "--nodes", "1"]) == 0
        assert f"#SBATCH --time={given}\n" in capsys.readouterr().out
        path.write_text(path.read_text().replace(written, "TIME"))


def test_without_slurm_and_when_slurm_refuses_it_is_told(
    write_run_file: WriteRunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(write_run_file())]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "sbatch").write_text(
        '#!/bin/sh\necho "sbatch: error: Batch job submission failed: No partition" >&2\nexit 1'
    )
    (tmp_path / "sbatch").chmod(0o755)
    assert main(["submit", str(write_run_file())]) == 2
    assert "SLURM refuses the job: Batch job submission failed: No partition; mend section" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "123;cluster"')
    assert main(["submit", str(write_run_file()), "seed=7"]) == 0
    assert capsys.readouterr().out.startswith("job 123 submitted")
    # What is trained is what was submitted, whatever becomes of the run file.
    assert load_config(tmp_path / "run" / "submit.yaml").seed == 7
    assert f"set -- {tmp_path}/run/submit.yaml\n" in (tmp_path / "run" / "submit.sbatch").read_text()


def test_what_the_plan_foresees_is_told_and_not_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    example = str(ROOT / "examples" / "qwen3-vl-embedding-2b.yaml")
    words = ["submit", example, "--nodes", "1", "--dry-run", "slurm.gpus_per_node=8"]
    assert main([*words, "slurm.gpu_type=h100"]) == 0
    # The plan's time for a save, twice, and half a minute.
    assert "#SBATCH --signal=USR1@81\n" in capsys.readouterr().out
    assert main([*words, "slurm.gpu_type=l4", "strategy=ddp"]) == 2
    error = capsys.readouterr().err
    assert "foreseen: strategy ddp needs" in error
    assert "--no-plan submits all the same" in error
    assert main([*words, "slurm.gpu_type=l4", "strategy=ddp", "--no-plan"]) == 0
    assert f"#SBATCH --signal=USR1@{UNKNOWN_LEAD_SECONDS}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="GPU h101 is not known; the kinds are cpu, h200"):
        submit(Path(example), ["slurm.gpu_type=h101"], nodes=1, dry_run=True)


def test_status_tells_how_a_run_stands(
    write_run_file: WriteRunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file()

    def told() -> str:
        assert main(["status", str(path)]) == 0
        return capsys.readouterr().out

    folder = RunFolder(tmp_path / "run")
    assert told() == ""
    (folder.checkpoints / "step-00000012").mkdir(parents=True)
    write_status(folder, "stopped", reason="stopped by SIGUSR1 at rank 0 after step 12", exit_code=75)
    assert told() == "stopped step-00000012 stopped by SIGUSR1 at rank 0 after step 12\n"
    write_status(folder, "failed", reason="two\nlines \x1b[2J")
    assert told() == "failed step-00000012 two lines \\x1b[2J\n"
    folder.status.write_text("{}")
    assert told() == "unknown -\n"
    write_status(folder, "running", step=13)
    assert told() == "running step-00000012\n"
