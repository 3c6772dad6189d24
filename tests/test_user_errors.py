"""Each mistake a user can make before the first step: one line that says what, why and what to do; exit code 2."""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import make_inputs, run_tree
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from farnear.cli import train_command
from farnear.run_folder import RunFolder, claimed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("errors"))


def mistake(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **keys: Any) -> str:
    """The one line that a training with these keys ends with."""
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(folder, "run", **keys)))
    capsys.readouterr()
    assert train_command([str(run_file), *overrides]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("farnear: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_missing_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(folder, capsys, data={"train": str(folder / "data" / "train-{000000..000001}.tar")})
    assert "data.train" in line
    assert "train-000001.tar" in line


def test_an_empty_tar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(folder / "empty.tar", "w"):
        pass
    line = mistake(folder, capsys, data={"train": str(folder / "empty.tar")})
    assert "empty.tar" in line
    assert "no" in line


def test_an_unknown_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(folder, capsys, "training.learning_rat=1")
    assert "unknown key 'training.learning_rat'; did you mean 'training.learning_rate'?" in line


def test_an_output_dir_that_is_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    assert "exists: " in (line := mistake(folder, capsys, f"output_dir={folder / 'file'}")), line
    assert "Not a directory: " in mistake(folder, capsys, f"output_dir={folder / 'file' / 'below'}")


def test_a_folder_of_somebody_elses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = folder / "theirs"
    (theirs / "export").mkdir(parents=True)
    assert "holds export, but is no run folder" in mistake(folder, capsys, f"output_dir={theirs}")
    assert list(theirs.iterdir()) == [theirs / "export"]


def test_a_run_folder_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(RunFolder(folder / "busy")):
        line = mistake(folder, capsys, f"output_dir={folder / 'busy'}", "training.max_steps=1")
    assert f"another run is writing into {folder / 'busy'} (process {os.getpid()} on " in line
    assert not (folder / "busy" / "index").exists()


def test_a_shard_on_both_sides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(folder, capsys, data={"eval": str(folder / "data" / "train-*.tar")})
    assert "is in data.train and in data.eval" in line


def test_config_files_that_contradict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    assert "the accelerate config starts without DeepSpeed" in mistake(folder, capsys, "strategy=zero2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "the accelerate config starts with DeepSpeed" in mistake(folder, capsys, "strategy=ddp")


def test_a_wrong_world_size(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs ranks, but this process was started alone" in mistake(folder, capsys, "strategy=ddp")
    monkeypatch.setenv("WORLD_SIZE", "1")
    line = mistake(folder, capsys, "strategy=ddp", "num_processes=4")
    assert "asks for num_processes=4, but the launcher started 1" in line


def test_a_dim_that_the_model_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "matryoshka_dims names 65, but the embeddings" in mistake(folder, capsys, loss={"matryoshka_dims": [65]})


def test_a_tracker_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(folder, capsys, "training.report_to=tensorbord")
    assert "'tensorbord', which accelerate does not know" in line
    assert "comet_ml, which is not installed" in mistake(folder, capsys, "training.report_to=comet_ml")


def test_a_model_without_image_support(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text_only = folder / "text-only"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(text_only)
    small = BertConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(small).save_pretrained(text_only)
    assert "has no image support" in mistake(folder, capsys, model={"name_or_path": str(text_only)})


def test_an_existing_run_folder_and_a_resume_of_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoint" in mistake(folder, capsys, "--resume")
    (folder / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    line = mistake(folder, capsys)
    assert "--resume" in line
    assert "another output_dir" in line
    shutil.rmtree(folder / "run")


def test_an_exclusion_that_the_run_itself_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(folder / "run" / "quarantine.jsonl")
    line = mistake(folder, capsys, data={"exclude": own})
    assert f"data.exclude: {own} lies in output_dir" in line


def test_a_checkpoint_of_another_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = folder / "first.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(folder, "run", training={"max_steps": 1})))
    assert train_command([str(run_file)]) == 0
    line = mistake(folder, capsys, "seed=7", "--resume")
    assert "made with another seed (42, now 7)" in line
    line = mistake(folder, capsys, "training.global_batch_size=4", "--resume")
    assert "another training.global_batch_size (8, now 4)" in line
    line = mistake(folder, capsys, "data.tail=carry", "--resume")
    assert "made with another value of data.tail (pad, now carry)" in line
    # Epoch 0 has the same plan, for no window is as large.
    line = mistake(folder, capsys, "data.shards_per_window=1000", "--resume")
    assert "made with another value of data.shards_per_window (None, now 1000)" in line
