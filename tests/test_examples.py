"""Every run file in examples/: read, planned, and trained for two steps as it stands, in a folder of stand-ins.

Replaced is what this machine has not: GPUs (flash attention), ranks (the strategy), hours (the number of steps, and
data workers, whose start takes longer than the steps) and pairs (a batch of more than there are). What was trained is
compared with the example key by key, so nothing else can be.
"""

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from stages_here import run_stages_here
from stand_ins import EVAL_NEGATIVES, EVAL_QUERIES, MODELS, PAIRS, make_data

import farnear
from farnear.cli import main
from farnear.commands.mine import rank_command
from farnear.config import RunConfig, load_config, models_named
from farnear.export_folder import whole_export
from farnear.flywheel_file import is_flywheel, read_flywheel
from farnear.launching import local

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
RECIPE = ROOT / "examples" / "qwen3-vl-embedding-2b.yaml"
INSTEAD = {"strategy": "single", "training.max_steps": 2, "data.dataloader_num_workers": 0}
NEEDS_A_GPU = ("flash_attention_2", "flash_attention_3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which examples are run, with what their own first lines import."""
    place = tmp_path_factory.mktemp("examples")
    make_data(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "hf-cache")
        datasets.disable_progress_bars()
        patch.chdir(place)
        for name in ("qwen3-vl-embedding-2b", "csv-on-cpu"):
            for words in commands_of(ROOT / "examples" / f"{name}.yaml", "shards"):
                assert main(words) == 0
        yield place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def commands_of(example: Path, command: str) -> list[list[str]]:
    """The words of a command of farnear in the comment at the head of an example, each time it is there."""
    lines = re.findall(rf"^#   farnear ({command} .*)$", example.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def stand_in(config: RunConfig) -> None:
    """Make the models that a run file names, but those that other runs make."""
    for model in models_named(config):
        if model.name_or_path in MODELS and not Path(model.name_or_path).exists():
            MODELS[model.name_or_path](Path(model.name_or_path))


def instead_of(config: RunConfig) -> dict[str, Any]:
    """What stands for the keys that cannot be here."""
    needs_gpu = config.model.attn_implementation in NEEDS_A_GPU
    fewer = {"training.global_batch_size": min(config.training.global_batch_size, PAIRS)}
    return {**INSTEAD, **fewer, **({"model.attn_implementation": "sdpa"} if needs_gpu else {})}


def words_of(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]


def flat(config: RunConfig) -> dict[str, Any]:
    keys = {}
    for section, value in config.model_dump(mode="json").items():
        keys |= {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
    return keys


def assert_changed(example: RunConfig, run_file: Path, instead: dict[str, Any]) -> None:
    """What was run is what is written, but for ``instead``."""
    written, run = flat(example), flat(load_config(run_file))
    assert written.keys() == run.keys()
    changed = {key: value for key, value in run.items() if value != written[key]}
    assert changed == {key: value for key, value in instead.items() if value != written[key]}


def assert_trained_as_written(example: RunConfig, run: Path, instead: dict[str, Any]) -> None:
    """Two steps with finite losses, an export that is whole, and no key but those ``instead`` changed on the way."""
    assert_changed(example, run / "run.yaml", instead)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in steps)
    assert all(step["pairs"] == min(example.training.global_batch_size, PAIRS) for step in steps)
    assert "README.md" in whole_export(run / "export")
    measured = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert measured[-1]["kind"] == "after"
    dims = {str(dim) for dim in example.loss.matryoshka_dims or ()}
    assert dims <= measured[-1]["metrics"].keys()


def train(example: Path) -> Path:
    """Its run, trained if it is not yet."""
    config = load_config(example)
    run = Path(config.output_dir)
    if (run / "summary.json").exists():
        return run
    # What an example mines with, it names in its head.
    for _, file, *words in commands_of(example, "mine"):
        embedder = ROOT / file
        train(embedder)
        instead = instead_of(load_config(embedder))
        assert main(["mine", str(embedder), *words, *words_of(instead)]) == 0
    stand_in(config)
    farnear.train(load_config(example, words_of(instead_of(config))))
    return run


RUN_FILES = [path for path in EXAMPLES if not is_flywheel(path)]
FLYWHEELS = [path for path in EXAMPLES if is_flywheel(path)]


@pytest.mark.parametrize("example", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_trains_as_it_stands(example: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "supervise", lambda command, threads: rank_command(command[3:]))
    config = load_config(example)
    assert_trained_as_written(config, train(example), instead_of(config))


@pytest.mark.parametrize("example", FLYWHEELS, ids=lambda path: path.stem)
def test_a_flywheel_turns_as_it_stands(example: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stages_here(monkeypatch)
    stages = read_flywheel(example).stages
    for stage in stages:
        stand_in(stage.config)
    # A reranker that judges a hundred pages of each query would take a minute.
    shorter = {stage.name: {"mining.range_max": 10} for stage in stages if stage.config.mining.reranker}
    words = [f"stages.{name}.mine.{word}" for name, keys in shorter.items() for word in words_of(keys)]
    assert main(["launch", str(example), *words_of(INSTEAD), *words]) == 0
    for stage in stages:
        if stage.does == "train":
            assert_trained_as_written(stage.config, stage.folder, INSTEAD)
        else:
            assert_changed(stage.config, stage.run_file, {**INSTEAD, **shorter.get(stage.name, {})})
            assert (stage.folder / "negatives.jsonl").read_text().count("\n") == 1 + PAIRS


def test_the_recipe_is_the_published_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(RECIPE)
    assert config.model.name_or_path == "Qwen/Qwen3-VL-Embedding-2B"
    assert config.model.attn_implementation == "flash_attention_2"
    assert (config.model.min_pixels, config.model.max_pixels) == (28 * 28, 600 * 600)
    assert config.loss.matryoshka_dims == (2048, 1536, 1024, 512, 256, 128, 64)
    training = config.training
    assert (training.bf16, training.num_train_epochs, training.global_batch_size) == (True, 1.0, 64)
    assert (config.loss.scale, training.learning_rate, training.warmup_ratio) == (20.0, 2e-5, 0.1)
    # One negative of each pair in training; in the evaluation the positives and four negatives a query.
    run = train(RECIPE)
    facts = json.loads((run / "card.json").read_text())["data"]
    assert (facts["pairs"], facts["negatives"]) == (PAIRS, PAIRS)
    assert (facts["eval_queries"], facts["eval_pages"]) == (EVAL_QUERIES, EVAL_QUERIES * (1 + EVAL_NEGATIVES))


@pytest.mark.parametrize("example", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_is_planned(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own model's config.json, where that is in examples/; the words are those of its head, if it has some."""
    monkeypatch.chdir(tmp_path)
    config = load_config(example)
    if config.model.name_or_path == "runs/tiny":
        stand_in(config)
    [words] = commands_of(example, "plan") or [["plan", ""]]
    assert "could not be followed" not in assert_planned([str(example), *words[2:]], capsys)


@pytest.mark.parametrize("example", FLYWHEELS, ids=lambda path: path.stem)
def test_trainings_of_a_flywheel_are_planned(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if their run files lay beside the file that they are written from, and each stage had left its export."""
    monkeypatch.chdir(tmp_path)
    described = {path.parent.name: path for path in (ROOT / "examples").glob("*/config.json")}
    for name, path in described.items():
        shutil.copytree(path.parent, tmp_path / name)
    trainings = {stage.name: stage for stage in read_flywheel(example).stages if stage.does == "train"}
    for name, stage in trainings.items():
        run_file = tmp_path / f"{name}.yaml"
        run_file.write_text(yaml.safe_dump(stage.tree), encoding="utf-8")
        assert_planned([str(run_file), "--gpu", "h100"], capsys)
        (stage.folder / "export").mkdir(parents=True)
        base = described.get(Path(stage.config.model.name_or_path).name.lower())
        if base is not None:
            shutil.copy(base, stage.folder / "export")
    assert {"embedder", "reranker", "distilled"} <= trainings.keys()


def assert_planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of it."""
    code = main(["plan", *words])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "<- chosen" in told.out and "memory of a rank" in told.out
    return told.out


def test_the_job_script_is_what_submit_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a clone at /path/to/farnear."""
    monkeypatch.chdir(ROOT)
    [words] = commands_of(RECIPE, "submit")
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out.replace(str(ROOT), "/path/to/farnear")
    assert printed == (ROOT / "examples" / RECIPE.stem / "train.sbatch").read_text(encoding="utf-8")


def test_the_table_names_every_example() -> None:
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = [row for row in table.splitlines() if row.startswith("| [")]
    assert [re.findall(r"\(([^)]+)\)", row)[0] for row in rows] == [path.name for path in EXAMPLES]
    for row, example in zip(rows, EXAMPLES, strict=True):
        command = re.findall(r"`(farnear [^`]+)`", row)[-1]
        assert f"#   {command}\n" in example.read_text(encoding="utf-8"), command
