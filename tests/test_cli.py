"""The commands: their words, their exit codes, and that a mistake is one line on standard error."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import WriteRunFile

import farnear
from farnear import cli
from farnear.launching import local
from farnear.launching.nodes import Nodes

COMMANDS = [
    ["demo"],
    ["launch"],
    ["export"],
    ["push"],
    ["report"],
    ["watch"],
    ["tiny"],
    ["shards"],
    ["shards", "from-hf"],
    ["shards", "from-pdf"],
    ["shards", "from-csv"],
    ["shards", "synth"],
    ["shards", "queries"],
    ["shards", "queries", "export"],
    ["shards", "queries", "run"],
    ["shards", "queries", "import"],
]


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert " ".join(["  farnear", *words]) in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; from farnear.cli import main\ntry: main(['--help'])\nfinally: print(*sorted(sys.modules))"
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 2  # seconds; 0.1 on an idle machine
    modules = set(ended.stdout.splitlines()[-1].split())
    assert not modules & {"torch", "transformers", "numpy", "pydantic", "accelerate"}


def test_a_tiny_model_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farnear.noise.quiet", lambda: None)  # for the other tests of this process
    assert cli.main(["tiny", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert cli.main(["tiny", str(tmp_path)]) == 2
    assert "is there already, and is not replaced" in capsys.readouterr().err


@pytest.mark.parametrize(("output", "told"), [("/dev/full", "standard output cannot be written"), ("", "")])
def test_output_that_cannot_be_written(output: str, told: str, tmp_path: Path) -> None:
    """A full disk takes a line, and where a shell has closed the stream nobody wants it."""
    (tmp_path / "run.lock").touch()
    command = f"{sys.executable} -m farnear watch {tmp_path} --once >{output or '&-'}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.returncode == (2 if told else 0), ended.stderr
    assert told in ended.stderr and ended.stderr.count("\n") == bool(told)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"farnear {farnear.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see farnear --help"),
        (["lunch"], "invalid choice: 'lunch'"),
        (["launch"], "the following arguments are required: RUN.yaml; see farnear launch --help"),
        (["launch", "missing.yaml"], "run file missing.yaml cannot be read (No such file or directory)"),
        (["launch", "RUN", "--reume"], "--reume is not known here"),
        (["launch", "RUN", "--resume=never"], "'never' is not a way to resume; say --resume or --resume auto"),
        (["launch", "RUN", "--training.max_steps=3"], "an override is written without dashes: training.max_steps=3"),
        (["launch", "RUN", "max_steps"], "'max_steps' is not an override"),
        (["launch", "RUN", "--num_processes", "0"], "'0' is not a whole number from 1 on"),
        (["launch", "RUN", "--num_proc", "2"], "--num_proc is not known here"),
        (["report", "a", "b"], "b is not known here"),
        (["report", "missing"], "missing"),
        (["shards"], "the following arguments are required: COMMAND; see farnear shards --help"),
        (["shards", "synth", "out", "--size", "100"], "'100' is not a size; write WIDTHxHEIGHT"),
        (["shards", "from-pdf", "missing", "out"], "missing"),
        (["shards", "from-hf", "./missing", "out"], "missing does not exist"),
        (["shards", "queries"], "the following arguments are required: STEP; see farnear shards queries --help"),
        (["shards", "queries", "export", "missing.tar", "--model", "m"], "missing.tar does not exist"),
        (["shards", "queries", "import", "missing.tar", "missing.jsonl", "out"], "missing.tar does not exist"),
        (["shards", "from-csv", "missing.csv", "out"], "missing.csv"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, write_run_file: WriteRunFile, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = str(write_run_file())
    assert cli.main([run_file if word == "RUN" else word for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("farnear: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("words", "resume", "overrides"),
    [
        (["RUN"], None, []),
        (["RUN", "--resume"], "newest", []),
        (["RUN", "--resume", "auto"], "auto", []),
        (["RUN", "--resume=auto"], "auto", []),
        (["--resume", "auto", "RUN"], "auto", []),
        (["RUN", "--resume", "seed=3"], "newest", ["seed=3"]),
        (["RUN", "seed=3", "--resume", "training.max_steps=5"], "newest", ["seed=3", "training.max_steps=5"]),
        (["RUN", "seed=3", "--resume", "auto", "seed=4"], "auto", ["seed=3", "seed=4"]),
        (["--resume", "RUN", "seed=3"], "newest", ["seed=3"]),
    ],
)
def test_resume_takes_auto_and_leaves_overrides_alone(
    words: list[str],
    resume: str | None,
    overrides: list[str],
    write_run_file: WriteRunFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_file = write_run_file()
    words = [str(run_file) if word == "RUN" else word for word in words]
    calls = []
    monkeypatch.setattr(local, "launch", lambda *positional, **named: calls.append((positional, named)) or 0)
    assert cli.main(["launch", *words]) == 0
    given = {"resume": resume, "config_file": None, "num_processes": None, "nodes": Nodes(), "log_dir": None}
    assert calls == [((run_file, overrides), given)]

    trained = []
    monkeypatch.setattr(farnear, "train", lambda config, resume: trained.append((config, resume)))
    assert cli.train_command(words) == 0
    [(config, resume_of_rank)] = trained
    assert resume_of_rank == resume
    assert config.seed == ([42] + [int(word[5:]) for word in overrides if word.startswith("seed=")])[-1]


def test_a_mistake_that_the_training_meets_is_one_line_and_exit_code_2(
    write_run_file: WriteRunFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: object, resume: object) -> None:
        raise farnear.errors.UserError("no such shard")

    monkeypatch.setattr(farnear, "train", train)
    assert cli.train_command([str(write_run_file())]) == 2
    assert capsys.readouterr().err == "farnear: error: no such shard\n"
    assert cli.train_command([str(write_run_file()), "sed=3"]) == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err


def test_shards_from_csv_tells_what_was_written_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    rows = ["query,image,author"]
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"What is on page {number}?,{number}.png,me")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    out = tmp_path / "shards"
    assert cli.main(["shards", "from-csv", str(tmp_path / "pairs.csv"), str(out), "--eval-fraction", "0.34"]) == 0
    text = capsys.readouterr().out
    assert {path.name for path in out.glob("*.tar")} == {"train-000000.tar", "eval-000000.tar"}
    assert "train: 4 pairs in 1 shard\n" in text
    assert "eval: 2 pairs in 1 shard\n" in text
    assert "left out: column 'author'" in text
    # The words to paste into a run file are valid YAML and name the shards.
    pasted = yaml.safe_load(text[text.index("data:") :])
    assert pasted["data"] == {"train": [f"{out}/train-*.tar"], "eval": [f"{out}/eval-*.tar"]}


def test_shards_synth_writes_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "synth", str(tmp_path / "out"), "--pairs", "6", "--eval-pairs", "4", "--pairs-per-shard", "3"]
    assert cli.main([*words, "--size", "64x80"]) == 0
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 2
    assert "6 pairs" in capsys.readouterr().out
    assert cli.main(words) == 2  # never written over
