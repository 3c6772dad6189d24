"""Model cards, `farnear export`, and the commit that a run holds on to."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import ModelCard
from object_stores import ModelHub, model_hub_server
from pair_makers import TEMPLATE, YES_NO, page
from safetensors.torch import load_file
from tiny_runs import cut_back, make_inputs, run_config

import farnear
from farnear.card_section import CardConfig
from farnear.cli import main
from farnear.errors import UserError
from farnear.export_folder import whole_export
from farnear.model.base import base_facts
from farnear.model.card_words import data_sets
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig
from farnear.training.checkpoint import open_checkpoint
from farnear.training.exporting import export_checkpoint

CARD = {
    "license": "Apache-2.0",
    "data_license": "cc-by-4.0",
    "language": "en",
    "datasets": "ada/pages",
    "model_name": "Pages found",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("cards"))
    save_tiny_model(folder / "base", texts=YES_NO, hidden_size=64, num_layers=2)
    own = "---\nlicense: mit\nbase_model: ada/first\n---\n\n# The base\n"
    (folder / "base" / "README.md").write_text(own, encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def evaluated(folder: Path, **keys: Any) -> dict[str, Any]:
    """Sections of a run that is measured on the way."""
    data = {"eval": str(folder / "data" / "eval-*.tar")}
    evaluation = {"eval_steps": 2, "sample_queries": 4, "sample_pages": 4, **keys}
    return {"data": data, "evaluation": evaluation}


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, list[str]]:
    """A run, and the cards of all that it exported on its way."""
    cards: list[str] = []

    def exported(*arguments: Any, card: str, **keys: Any) -> None:
        cards.append(card)
        export_model(*arguments, card=card, **keys)

    from farnear.training.embedders import export_model

    prompts = {"query": "Find: "}
    with patch("farnear.training.embedders.export_model", exported):
        model = {"prompts": prompts, "max_pixels": 4096, "lora": {"r": 4}}
        farnear.train(run_config(folder, "run", card=CARD, model=model, **evaluated(folder)))
    return folder / "run", cards


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Path:
    section = {"chat_template": str(folder / "template.jinja"), "num_negatives": 2, "instruction": "Judge\nthem."}
    keys = {**evaluated(folder, rerank_k=10), "loss": {"matryoshka_dims": None}, "reranker": section}
    farnear.train(run_config(folder, "reranker", training={"max_steps": 2}, model={"freeze": "visual"}, **keys))
    return folder / "reranker"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def words_of(export: Path) -> str:
    return (export / "README.md").read_text(encoding="utf-8")


def test_the_metadata_are_those_that_the_hub_reads(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    data = ModelCard.load(run / "export" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "sentence-transformers",
        "feature-extraction",
        "apache-2.0",
    )
    assert {"sentence-transformers", "visual-document-retrieval", "feature-extraction"} <= set(data.tags)
    assert (data.language, data.datasets, data.model_name) == ("en", ["ada/pages"], "Pages found")
    # A folder has no name on the hub; what it was made from has.
    assert (data.base_model, data.get("base_model_relation")) == ("ada/first", "finetune")
    after = records(run)[-1]
    assert after["kind"] == "after"
    assert data.eval_results is not None
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert len(found) == 2 * 3
    for dim, measures in after["metrics"].items():
        assert found["ndcg_at_10", f"nDCG@10, {dim} dimensions"] == round(measures["ndcg@10"], 4)
        assert found["mrr_at_10", f"MRR@10, {dim} dimensions"] == round(measures["mrr@10"], 4)
    assert {(one.task_type, one.dataset_name) for one in data.eval_results} == {("information-retrieval", "eval-*.tar")}
    assert {str(one.dataset_args) for one in data.eval_results} == {"{'queries': 8, 'pages': 8}"}


def test_the_words_say_what_it_was_made_of(finished: tuple[Path, list[str]], folder: Path) -> None:
    run, _ = finished
    words, noted = words_of(run / "export"), json.loads((run / "card.json").read_text())
    for told in (
        "# Pages found\n",
        "the local folder `base`, itself made from ada/first",
        "22 pairs, 22 different pages, 0 hard negatives, in 1 shard (`train-*.tar`)",
        f"fingerprint `{noted['data']['fingerprint']}`",
        "InfoNCE, query_to_doc, scale 20, fixed, summed over dims 64, 16",
        "**Batch**: 8 pairs",
        "**Steps**: 6 of 6",
        "**Learning rate**: 0.001, linear",
        "**LoRA**: r 4; merged here",
        "fp32 weights, fp32 compute",
        "single on 1 rank, CPU; seed 42",
        f"farnear {farnear.__version__}, torch {torch.__version__.partition('+')[0]}",
        "Pages are resized to at most 4,096 pixels.",
        "query `Find: `",
        "| this model | apache-2.0 |\n| base model | mit |\n| data | cc-by-4.0 |",
        "arxiv.org/abs/2205.13147",
        "arxiv.org/abs/2106.09685",
    ):
        assert told in words, told
    before, after = (record["metrics"] for record in (records(run)[0], records(run)[-1]))
    for dim in ("64", "16"):
        row = [
            f"{figures[dim][name]:.4f}" for name in ("ndcg@10", "recall@10", "mrr@10") for figures in (before, after)
        ]
        assert f"| {' | '.join([dim, *row])} |" in words
    assert {path.name for path in (run / "export").rglob("*.md")} == {"README.md"}
    assert whole_export(run / "export")


def test_nothing_of_this_machine_is_told(finished: tuple[Path, list[str]], reranker: Path, folder: Path) -> None:
    for text in (*finished[1], words_of(finished[0] / "export"), words_of(reranker / "export")):
        assert not re.search(r"(?<![\w/:.])/\w+/", text), text
        assert folder.name not in text
    for path in (*(finished[0] / "export").rglob("*"), *(reranker / "export").rglob("*")):
        assert path.is_dir() or folder.name.encode() not in path.read_bytes(), path


def test_the_card_of_the_best_so_far_has_what_is_known_then(finished: tuple[Path, list[str]]) -> None:
    run, cards = finished
    during = [record for record in records(run) if record["kind"] == "during"]
    assert len(cards) >= 2
    first = during[0]
    assert "Measured at step 2, on a sample: 4 queries against 4 pages of `eval-*.tar`" in cards[0]
    assert "measured on all, 8 queries against 8 pages, so the two do not compare" in cards[0]
    assert f" {first['metrics']['64']['ndcg@10']:.4f} " in cards[0]
    assert "**Steps**: 2 of 6" in cards[0]
    assert cards[-1] == words_of(run / "export")


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_the_code_in_a_card_runs_as_it_stands(
    finished: tuple[Path, list[str]],
    reranker: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the export lies, with two pages beside it."""
    run = finished[0] if kind == "embedder" else reranker
    (tmp_path / "export").symlink_to(run / "export")
    for number, name in enumerate(("page.png", "another-page.png")):
        page(64, 64, number).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", words_of(run / "export"), re.DOTALL)
    capsys.readouterr()
    there: dict[str, Any] = {}
    exec(code, there)
    told = capsys.readouterr().out
    if kind == "embedder":
        assert there["pages"].shape == (2, 16)
        assert told.count("tensor([[") == 2
    else:
        assert there["model"].predict([(there["query"], "page.png")]).shape == (1,)
        assert {one["corpus_id"] for one in there["model"].rank(there["query"], ["page.png", "another-page.png"])} == {
            0,
            1,
        }
        assert "corpus_id" in told


def test_a_rerankers_card_tells_both_stages(reranker: Path) -> None:
    data, words = ModelCard.load(reranker / "export" / "README.md").data, words_of(reranker / "export")
    assert (data.pipeline_tag, data.license) == ("text-ranking", "unknown")
    assert {"cross-encoder", "reranker", "text-ranking", "visual-document-retrieval"} <= set(data.tags)
    before, after = (record["metrics"]["1"] for record in (records(reranker)[0], records(reranker)[-1]))
    assert f"| reranked before training | {before['ndcg@10']:.4f} |" in words
    assert f"| reranked by this model | {after['ndcg@10']:.4f} |" in words
    assert "prompts that it was trained with: instruction `Judge\\nthem.`" in words
    assert "8 pairs, 2 other pages of the batch as negatives of each" in words
    assert "arxiv.org/abs/2101.06983" not in words


def test_licences_are_asked_for_before_the_first_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(output_dir: str, **card: Any) -> str:
        keys: dict[str, Any] = {"training": {"max_steps": 1}, "card": card}
        farnear.train(run_config(folder, output_dir, **keys))
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if line.startswith("   licence  ")]
        assert lines.index(line) < next(n for n, one in enumerate(lines) if one.startswith("step 1/"))
        return line

    line = told("asked")
    assert "unknown: the model's card says so, and farnear push refuses it; set card.license" in line
    assert line.endswith("(base mit, data unknown)")
    words = words_of(folder / "asked" / "export")
    assert "| this model | unknown |\n| base model | mit |" in words and "It was not evaluated." in words
    assert main(["push", str(folder / "asked"), "--repo-id", "a/b", "--dry-run"]) == 2
    assert "names no licence" in capsys.readouterr().err
    # No training is needed to say it.
    again = folder / "asked-again"
    assert main(["export", str(folder / "asked"), str(again), "card.license=mit", "card.model_id=ada/b"]) == 0
    assert main(["push", str(again), "--repo-id", "ada/b", "--dry-run"]) == 0
    assert 'SentenceTransformer("ada/b")' in words_of(again)
    assert told("named", license="cc-by-4.0", base_license="gemma").endswith("cc-by-4.0; base gemma, data unknown")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"license": "Apache 2.0"}, r"card\.license: a licence by its SPDX or hub name, such as apache-2.0 or"),
        ({"language": ["en", "English"]}, r"card\.language: languages are two or three letters"),
        ({"model_id": "pages"}, r"card\.model_id: NAME/REPO, as on the hub, not 'pages'"),
        ({"datasets": ["/home/ada/pages"]}, r"card\.datasets: NAME/REPO"),
        ({"model_name": "a\nb"}, r"card\.model_name: a single line"),
        ({"licence": "mit"}, r"unknown key 'card\.licence'; did you mean 'card\.license'"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(folder: Path, card: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_config(folder, "x", card=card)
    assert "\n" not in str(caught.value)


def test_what_yaml_makes_of_a_language_and_where_data_sets_come_from(folder: Path) -> None:
    assert CardConfig.model_validate({"language": False}).language == ("no",)
    assert CardConfig.model_validate({"language": ["no", False, "en"]}).language == ("no", "no", "en")
    shards = ["hf://datasets/ada/pages@main/a-*.tar", "hf://datasets/ada/more/b.tar", str(folder / "c.tar")]
    config = run_config(folder, "x", data={"train": shards}, card={"datasets": ["ada/more", "bob/others"]})
    assert list(data_sets(config)) == ["ada/more", "bob/others", "ada/pages"]


@pytest.mark.parametrize(
    ("head", "license_name"),
    [
        ("license: other\nlicense_name: qwen-research", "qwen-research"),
        ("license: [mit, bsd]", "mit, bsd"),
        ("license: unknown", None),
        ("license: [", None),
        ("tags: [a]", None),
    ],
)
def test_a_bases_licence_is_that_of_its_card(folder: Path, tmp_path: Path, head: str, license_name: str | None) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}\n---\n")
    assert base_facts(ModelConfig(name_or_path=str(tmp_path / "base")), None).license == license_name


def test_a_checkpoint_becomes_what_the_run_exported(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, _ = finished
    assert export_checkpoint(run, tmp_path / "export").name == "step-00000006"
    again, wanted = whole_export(tmp_path / "export"), whole_export(run / "export")
    assert again == wanted
    for name in wanted:
        assert (tmp_path / "export" / name).read_bytes() == (run / "export" / name).read_bytes(), name
    # Of an earlier one, what was known then.
    assert main(["export", str(run / "checkpoints" / "step-00000003"), str(tmp_path / "three")]) == 0
    words = words_of(tmp_path / "three")
    assert "**Steps**: 3 of 6" in words and "Measured at step 2, on a sample" in words
    first = load_file(tmp_path / "three" / "adapter" / "adapter_model.safetensors")
    last = load_file(run / "export" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in last)
    # Without what the run has noted, its run file and the checkpoint say what they know.
    bare = cut_back(run, 3, "bare")
    (bare / "card.json").unlink()
    with open(bare / "eval.jsonl", "a") as file:
        file.write('{"step": 4, "ki')
    export_checkpoint(bare, tmp_path / "bare")
    words = words_of(tmp_path / "bare")
    assert "**Data**: `train-*.tar`" in words and "**Steps**: 3 of 6" in words and "different page" not in words


def test_the_best_is_exported_with_its_own_figures(folder: Path, tmp_path: Path) -> None:
    """Exported is the best, whose step is not the last one; the evaluation after the training is of it."""
    order = iter([0.9, 0.1, 0.2])

    def judged(run: Any, kind: str, step: int) -> float:
        return next(order) if (metric := measure(run, kind, step)) is not None and kind == "during" else metric

    from farnear.training.run import measure

    with patch("farnear.training.run.measure", judged):
        training = {"load_best_model_at_end": True}
        summary = farnear.train(run_config(folder, "best", training=training, **evaluated(folder)))
    assert summary["exported_step"] == 2
    run = folder / "best"
    assert export_checkpoint(run, tmp_path / "best", best=True).name == "step-00000002"
    assert words_of(tmp_path / "best").replace('"best"', '"export"') == words_of(run / "export")
    assert "Measured on 8 queries against 8 pages" in words_of(tmp_path / "best")
    export_checkpoint(run, tmp_path / "last")
    assert "Measured at step 6, on a sample" in words_of(tmp_path / "last")


def test_what_is_frozen_must_be_what_was_trained_beside(reranker: Path, folder: Path, tmp_path: Path) -> None:
    export_checkpoint(reranker, tmp_path / "export")
    name = "model.safetensors"
    assert (tmp_path / "export" / name).read_bytes() == (reranker / "export" / name).read_bytes()
    save_tiny_model(tmp_path / "other", texts=YES_NO, hidden_size=64, num_layers=2, seed=1)
    with pytest.raises(UserError, match=r"frozen weights of .*other are not those that the model was trained beside"):
        export_checkpoint(reranker, tmp_path / "x", overrides=[f"model.name_or_path={tmp_path / 'other'}"])
    assert not (tmp_path / "x").exists()
    (tmp_path / "other").rename(tmp_path / "away")
    shutil.copytree(folder / "base", tmp_path / "other")
    export_checkpoint(reranker, tmp_path / "x", overrides=[f"model.name_or_path={tmp_path / 'other'}"])


def test_what_cannot_be_exported_is_told(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000006"

    def refused(message: str, path: Path, out: str = "out", **keys: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            export_checkpoint(path, tmp_path / out, **keys)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    refused(r"taken is there already, and an export replaces nothing of yours", run, "taken")
    refused(r"training.seed=1: a model that is trained already stays", run, overrides=["training.seed=1"])
    refused(r"there is no folder .*nowhere", tmp_path / "nowhere")
    refused(r"is no run folder with checkpoints", newest, best=True)
    [file] = newest.glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    refused(rf"{file.name} does not hold what was saved \(its hash differs\); name an older checkpoint", run)
    file.write_bytes(whole[:-1])
    refused(rf"{file.name} has {len(whole) - 1} bytes, not the {len(whole)}", newest)
    file.unlink()
    refused(rf"lacks {file.name}", run)
    (run / "best").unlink()
    refused(r"names no best checkpoint", run, best=True)
    (run / "run.yaml").unlink()
    refused(r"there is no .*run.yaml, which names the base model", run / "checkpoints" / "step-00000003")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    refused(r"holds no checkpoint", run)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """Where the base model is org/tiny."""
    from huggingface_hub import constants

    with model_hub_server() as hub:
        hub.files = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


def test_a_run_holds_on_to_the_commit_that_it_began_with(
    folder: Path, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    def keys(steps: int, **model: Any) -> dict[str, Any]:
        return {"model": {"name_or_path": "org/tiny", **model}, "training": {"max_steps": steps}}

    began, moved = hub.commit, "f" * 40
    commits = {"model.name_or_path": began}
    summary = farnear.train(run_config(folder, "held", **keys(1)))
    run = folder / "held"
    assert summary["base_commits"] == commits
    assert (
        open_checkpoint(run / "checkpoints" / "step-00000001").progress.bases["model.name_or_path"]["commit"] == began
    )
    data = ModelCard.load(run / "export" / "README.md").data
    assert (data.base_model, data.get("base_model_revision"), data.license) == ("org/tiny", began, "unknown")
    told = f"[org/tiny](https://huggingface.co/org/tiny) at commit `{began}`"
    assert told in words_of(run / "export")
    assert "| base model | mit |" in words_of(run / "export")
    assert "revision: null" in (run / "run.yaml").read_text()

    # The branch moves on, to another model. The run does not.
    hub.commit, hub.former = moved, {began: dict(hub.files)}
    hub.files["README.md"] = b"---\nlicense: gemma\n---\n"
    hub.files["chat_template.jinja"] = hub.files["chat_template.jinja"].replace(b"<|im_start|>", b"<|im_end|>")
    summary = farnear.train(run_config(folder, "held", **keys(2)), "newest")
    assert summary["base_commits"] == commits
    assert told in words_of(run / "export") and "gemma" not in words_of(run / "export")
    kept = (folder / "base" / "chat_template.jinja").read_bytes()
    assert (run / "export" / "chat_template.jinja").read_bytes() == kept
    for revision in (moved, "main"):
        with pytest.raises(UserError, match=rf"was trained from org/tiny at commit {began}, .* set model.revision: "):
            farnear.train(run_config(folder, "held", **keys(3, revision=revision)), "newest")
    capsys.readouterr()
    assert farnear.train(run_config(folder, "held", **keys(3, revision=began)), "newest")["base_commits"] == commits
    # And all of it without a network, from the cache that the run has filled.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert farnear.train(run_config(folder, "held", **keys(4, revision=began)), "newest")["base_commits"] == commits
    export_checkpoint(run, tmp_path / "export")
    assert told in words_of(tmp_path / "export")
    assert len(hub.requests) == asked
