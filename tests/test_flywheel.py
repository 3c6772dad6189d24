"""Flywheel files: read and refused, and run in whole, killed in the middle, gone on with, and passed over when done."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pair_makers import TEMPLATE, YES_NO
from stages_here import run_stages_here
from tiny_runs import make_inputs

from farnear.cli import main
from farnear.config import load_config
from farnear.errors import UserError
from farnear.flywheel_file import read_flywheel
from farnear.launching import flywheel
from farnear.model.tiny import save_tiny_model


def tree(folder: Path) -> dict[str, Any]:
    """Embedder, its hard negatives, a reranker, its judgement, and the embedder that learns from it."""
    data = folder / "data"
    judged = {"reranker": "{reranker}", "reranker_margin": None, "num_negatives": 3}
    return {
        "output_dir": str(folder / "wheel"),
        "strategy": "single",
        "data": {
            "train": str(data / "train-*.tar"),
            "eval": str(data / "eval-*.tar"),
            "tail": "pad",
            "dataloader_num_workers": 0,
        },
        "training": {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 2, "save_steps": 1},
        "evaluation": {"eval_on_start": False},
        "stages": {
            "embedder": {"train": {"model": {"name_or_path": str(folder / "base")}}},
            "negatives": {"mine": {"model": {"name_or_path": "{embedder}"}, "mining": {"num_negatives": 2}}},
            "reranker": {
                "train": {
                    "model": {"name_or_path": str(folder / "base")},
                    "data": {"negatives": ["{negatives}"]},
                    "reranker": {"num_negatives": 1, "chat_template": str(folder / "template.jinja")},
                    "evaluation": {"embedder": "{embedder}", "rerank_k": 10},
                }
            },
            "judged": {"mine": {"model": {"name_or_path": "{embedder}"}, "mining": judged}},
            "distilled": {
                "train": {
                    "model": {"name_or_path": "{embedder}"},
                    "data": {"negatives": "{judged}"},
                    "loss": {"distillation": "listwise_distillation"},
                }
            },
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flywheel")
    make_inputs(folder)
    save_tiny_model(folder / "base", texts=YES_NO, hidden_size=64, num_layers=2)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def written(folder: Path, of: dict[str, Any]) -> Path:
    path = folder / "flywheel.yaml"
    path.write_text(yaml.safe_dump(of, sort_keys=False), encoding="utf-8")
    return path


def test_stages_have_what_those_before_them_leave(folder: Path) -> None:
    words = ["training.max_steps=5", "evaluation.eval_on_start=true", "stages.reranker.train.training.max_steps=7"]
    stages = read_flywheel(written(folder, tree(folder)), words).stages
    embedder, negatives, reranker, judged, distilled = stages
    wheel = folder / "wheel"
    assert [stage.does for stage in stages] == ["train", "mine", "train", "mine", "train"]
    assert negatives.config.model.name_or_path == distilled.config.model.name_or_path == str(wheel / "embedder/export")
    assert reranker.config.data.negatives == (str(wheel / "negatives/negatives.jsonl"),)
    assert judged.config.mining.reranker == str(wheel / "reranker/export")
    needs = [set(stage.needs) for stage in stages]
    assert needs == [set(), {"embedder"}, {"negatives", "embedder"}, {"embedder", "reranker"}, {"embedder", "judged"}]
    assert [stage.config.training.max_steps for stage in stages] == [5, 5, 7, 5, 5]
    assert embedder.config.output_dir == str(wheel / "embedder")
    assert reranker.config.evaluation.eval_on_start is True


def test_models_of_stages_are_known_by_their_stages_and_others_by_their_files(folder: Path) -> None:
    of = tree(folder)
    of["stages"]["judged"]["mine"]["model"]["name_or_path"] = str(folder / "base")
    for words in ([], ["output_dir=."]):
        made_of = flywheel._made_of(read_flywheel(written(folder, of), words))
        files = {name: {key for key in made_of[name] if key.startswith("files")} for name in ("negatives", "judged")}
        assert files == {"negatives": set(), "judged": {"files of model.name_or_path"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(stages=[]), "stages holds none"),
        (lambda t: t.pop("output_dir"), "output_dir is missing"),
        (lambda t: t["stages"].update({"9": {"train": {}}}), "stage 9: a name is a letter"),
        (lambda t: t["stages"].update(x={"learn": {}}), "stage x: holds learn; write one key, train or mine"),
        (lambda t: t["stages"].update(x=None), "stage x: holds None"),
        (lambda t: t["stages"]["embedder"]["train"].update(output_dir="x"), "output_dir stands once"),
        (lambda t: t["stages"]["embedder"]["train"]["model"].update(name_or_path="{embedder}"), "this stage itself"),
        (lambda t: t["stages"]["embedder"]["train"]["model"].update(name_or_path="{judged}"), "below this one"),
        (lambda t: t["stages"]["judged"]["mine"]["mining"].update(reranker="{rerankr}"), r"did you mean {reranker}\?"),
        (
            lambda t: t["stages"]["reranker"]["train"]["data"].update(negatives="{embedder.embeddings}"),
            r"stage embedder leaves no {embedder.embeddings}; it leaves {embedder}",
        ),
        (lambda t: t["stages"]["judged"]["mine"].update(reranker={}), "section reranker is a training's"),
        (
            lambda t: t["stages"]["judged"]["mine"]["model"].update(name_or_path="{reranker}"),
            "judged: model.name_or_path wants an embedder, and stage reranker leaves a reranker",
        ),
        (lambda t: t["stages"]["judged"]["mine"]["mining"].update(reranker="{embedder}"), "wants a reranker"),
        (lambda t: t["stages"]["reranker"]["train"]["evaluation"].update(embedder="{embedder}/x"), "as a whole value"),
        (lambda t: t["stages"]["reranker"]["train"]["data"].update(negatives="{embedder}"), "wants negatives.jsonl"),
        (lambda t: t["stages"]["embedder"]["train"].update(loss={"scal": 1}), "stage embedder: .*did you mean"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    folder: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of = tree(folder)
    change(of)
    of["output_dir"] = of.get("output_dir") and str(folder / "nothing")
    if of["output_dir"] is None:
        del of["output_dir"]
    assert main(["launch", str(written(folder, of))]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert re.search(message, told), told
    assert not (folder / "nothing").exists()


def test_other_commands_say_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="has stages, which `farnear launch` runs"):
        load_config(written(folder, tree(folder)))
    for words, message in (
        (["--num_machines", "2"], "run on one machine"),
        (["--config_file", "x"], "drop --config_file"),
        (["stages.embeder.train.seed=1"], "did you mean stages.embedder?"),
        ([f"output_dir={folder}", "stages.flywheel.train=null"], "there are embedder, negatives"),
    ):
        assert main(["launch", str(folder / "flywheel.yaml"), *words]) == 2
        assert message in capsys.readouterr().err
    of = tree(folder)
    of["stages"]["flywheel"] = of["stages"]["embedder"]
    of["output_dir"] = str(folder)
    assert main(["launch", str(written(folder, of))]) == 2
    assert "would replace this file" in capsys.readouterr().err


@pytest.mark.parametrize("launches", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_wheel_turns_and_goes_on_where_it_stopped(
    folder: Path,
    tmp_path: Path,
    launches: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not launches:
        run_stages_here(monkeypatch)
    wheel = tmp_path / "wheel"
    file = written(folder, tree(folder) | {"output_dir": str(wheel)})
    # The third stage fails: what it needs is broken. The two before it are done and stay so.
    (folder / "template.jinja").rename(folder / "away.jinja")
    assert main(["launch", str(file)]) == 2
    assert "chat_template" in capfd.readouterr().err
    entries = json.loads((wheel / "stages.json").read_text())
    assert [name for name, entry in entries.items() if "result" in entry] == ["embedder", "negatives"]
    (folder / "away.jinja").rename(folder / "template.jinja")
    before = (wheel / "embedder" / "status.json").read_bytes(), (wheel / "negatives" / "report.json").read_bytes()

    assert main(["launch", str(file), "training.logging_steps=1"]) == 0
    printed = capfd.readouterr().out
    assert "stage 1 of 5: embedder (train): done" in printed
    assert "stage 2 of 5: negatives (mine): done" in printed
    after = (wheel / "embedder" / "status.json").read_bytes(), (wheel / "negatives" / "report.json").read_bytes()
    assert after == before
    results = {name: of["result"] for name, of in json.loads((wheel / "stages.json").read_text()).items()}
    assert list(results) == ["embedder", "negatives", "reranker", "judged", "distilled"]
    assert results["reranker"]["ndcg@10_embedder"] == pytest.approx(results["embedder"]["ndcg@10"], abs=1e-6)
    assert results["judged"] | {"seconds": 0} == {"does": "mine", "pairs": 22, "negatives": 66, "seconds": 0}
    last = (wheel / "distilled" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["distilled"] == 8
    # A stage's run file is one like any other.
    assert load_config(wheel / "reranker.yaml").output_dir == str(wheel / "reranker")

    assert main(["launch", str(file)]) == 0
    assert capfd.readouterr().out.count(": done") == 5
    # What has been made of something else is neither thrown away nor mixed, and looked at before any stage runs.
    before = (wheel / "negatives" / "negatives.jsonl").read_bytes()
    for words, told in (
        ("stages.embedder.train.training.max_steps=3", "stage embedder was made with another training.max_steps, and"),
        ("stages.negatives.mine.mining.num_negatives=1", "another mining.num_negatives, and what reranker, judged"),
        ("stages.distilled.train.loss.scale=5", "move distilled out of"),
    ):
        assert main(["launch", str(file), words]) == 2
        assert told in capfd.readouterr().err
    (wheel / "distilled" / "status.json").unlink()
    assert main(["launch", str(file), "stages.distilled.train.model.name_or_path=elsewhere"]) == 2
    assert "stage distilled was made with another model.name_or_path" in capfd.readouterr().err
    assert (wheel / "negatives" / "negatives.jsonl").read_bytes() == before
    # How it is computed may change.
    assert main(["launch", str(file), "training.mini_batch_size=3", "training.save_steps=2"]) == 0
    for damage in ("[1]", '{"embedder": {}}', "{"):
        (wheel / "stages.json").write_text(damage)
        assert main(["launch", str(file)]) == 2
        assert "stages.json is damaged" in capfd.readouterr().err
