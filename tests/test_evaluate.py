"""`farnear encode` and `evaluate`: embeddings are the model's own, measures those of ir_measures and of
sentence-transformers, whatever the precision; a killed encoding goes on."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import webdataset
from encode_here import encode_here
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny_runs import make_inputs, run_config

import farnear
from farnear.cli import main
from farnear.config import load_config
from farnear.errors import UserError
from farnear.launching import local
from farnear.model.load import load_model
from farnear.retrieve import collection_writing, embeddings
from farnear.retrieve.collection import open_collection
from farnear.retrieve.measure import measure
from farnear.retrieve.trec import write_qrels, write_run
from farnear.run_folder import DONE, RunFolder, claimed
from farnear.sections import ModelConfig

READERS = ((ir_measures.read_trec_qrels, "qrels.txt"), (ir_measures.read_trec_run, "run.trec"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a base model, and the same with its pooling, as sentence-transformers loads it."""
    folder = make_inputs(tmp_path_factory.mktemp("evaluate"))
    load_model(ModelConfig(name_or_path=str(folder / "base"))).save_pretrained(str(folder / "embedder"))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARNEAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def _pairs(shards: Path) -> tuple[dict[str, str], dict[str, Image.Image]]:
    """Query and page of each pair, by the pair's key."""
    queries, pages = {}, {}
    for sample in webdataset.WebDataset(str(shards), shardshuffle=False, empty_check=False):
        queries[sample["__key__"]] = json.loads(sample["json"])["query"]
        pages[sample["__key__"]] = Image.open(io.BytesIO(sample["png"])).convert("RGB")
    return queries, pages


def _evaluated(shards: Path, model: SentenceTransformer, dim: int) -> dict[str, float]:
    queries, pages = _pairs(shards)
    evaluator = InformationRetrievalEvaluator(
        queries=queries,
        corpus=pages,
        relevant_docs={key: {key} for key in queries},
        ndcg_at_k=[1, 5, 10],
        precision_recall_at_k=[1, 5, 10, 100],
        mrr_at_k=[10],
        map_at_k=[100],
        accuracy_at_k=[1],
        truncate_dim=dim,
    )
    found = evaluator(model)
    names = {"ndcg": "ndcg", "recall": "recall", "mrr": "mrr", "map": "map"}
    return {
        f"{name}@{key.rpartition('@')[2]}": value
        for key, value in found.items()
        for name in names
        if f"cosine_{name}@" in key
    }


def test_measures_are_those_of_sentence_transformers_and_of_ir_measures(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_here(monkeypatch)
    shards = inputs / "data" / "eval-000000.tar"
    words = ["evaluate", str(inputs / "embedder"), "--data", str(shards), "--dims", "64", "16", "--out", "out"]
    assert main([*words, "--precision", "float32", "int8", "binary"]) == 0
    results = json.loads(Path("out/embedder/results.json").read_text())
    by_place = {(row["dim"], row["precision"]): row for row in results["results"]}
    assert list(by_place) == [(dim, one) for dim in (64, 16) for one in ("float32", "int8", "binary")]
    model = SentenceTransformer(str(inputs / "embedder"), device="cpu")
    for dim in (64, 16):
        expected = _evaluated(shards, model, dim)
        found = by_place[dim, "float32"]
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert len(expected) == 9
    assert [by_place[64, one]["index_bytes"] for one in ("float32", "int8", "binary")] == [8 * 64 * 4, 8 * 64, 8 * 8]
    assert results["seconds_per_query"] > 0 and results["seconds_per_document"] > 0
    measured = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.R @ 5, ir_measures.RR @ 10, ir_measures.AP @ 100],
        ir_measures.read_trec_qrels("out/qrels.txt"),
        ir_measures.read_trec_run("out/embedder/run.trec"),
    )
    by_name = {str(measure): value for measure, value in measured.items()}
    found = by_place[64, "float32"]
    expected = {
        "nDCG@10": found["ndcg@10"],
        "R@5": found["recall@5"],
        "RR@10": found["mrr@10"],
        "AP@100": found["map@100"],
    }
    assert by_name == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found["ndcg@10"] < 0.9, "a ranking that is all right or all wrong shows nothing"
    assert f"{found['ndcg@10']:.4f}" in capsys.readouterr().out


def test_tools_that_sort_a_run_see_the_order_that_was_measured(tmp_path: Path) -> None:
    """trec_eval places equal scores by the document's id, the last one first."""
    ids = [f"page-{page:02d}" for page in range(30)]
    page_Qk = np.stack([np.random.default_rng(query).permutation(30) for query in range(20)])
    score_Qk = np.sort(np.random.default_rng(3).integers(0, 4, (20, 30)) / 7, axis=1)[:, ::-1].astype(np.float32)
    queries = [f"q{query}" for query in range(20)]
    relevant = [frozenset({query, 29 - query}) for query in range(20)]
    write_run(tmp_path / "run.trec", queries, ids, score_Qk, page_Qk, "a tag")
    write_qrels(tmp_path / "qrels.txt", queries, ids, relevant)
    qrels, run = (list(read(str(tmp_path / name))) for read, name in READERS)
    measured = ir_measures.calc_aggregate([ir_measures.nDCG @ 10, ir_measures.RR @ 10], qrels, run)
    expected = measure(page_Qk, relevant, ["ndcg@10", "mrr@10"])
    assert sorted(measured.values()) == pytest.approx(sorted(expected.values()), abs=1e-9)
    assert {one.query_id for one in run} == set(queries)


def test_embeddings_are_those_of_encode(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_here(monkeypatch)
    shards = inputs / "data" / "eval-000000.tar"
    queries, pages = _pairs(shards)
    model = SentenceTransformer(str(inputs / "embedder"), device="cpu")
    arguments: dict[str, Any] = {"truncate_dim": 32, "normalize_embeddings": True}
    for precision in ("float32", "int8", "binary"):
        words = ["encode", str(inputs / "embedder"), str(shards), f"out-{precision}", "--truncate_dim", "32"]
        assert main([*words, "--precision", precision]) == 0
        found = open_collection(Path(f"out-{precision}"))
        assert found.precision == precision and found.dim == 32
        keys = [name.rpartition("/")[2].removesuffix(".png") for name in found.document_ids]
        expected = model.encode_document([pages[key] for key in keys], precision=precision, **arguments)
        stored = np.load(f"out-{precision}/documents.npy")
        if precision == "float32":
            np.testing.assert_allclose(stored, expected, atol=1e-5)
        else:  # rounding may push a value over the edge of a step
            assert stored.dtype == expected.dtype and stored.shape == expected.shape
            assert (stored == expected).mean() > 0.99
        asked = [queries[name.rpartition("/")[2]] for name in found.query_ids]
        np.testing.assert_allclose(found.queries, model.encode_query(asked, **arguments), atol=1e-5)
        assert [found.texts[name] for name in found.query_ids] == asked
        answers = [{found.document_ids[page].rpartition("/")[2] for page in pages} for pages in found.relevant]
        assert answers == [{f"{name.rpartition('/')[2]}.png"} for name in found.query_ids]


def test_a_killed_encoding_goes_on_and_a_finished_one_is_left_alone(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = encode_here(monkeypatch)
    monkeypatch.setattr(embeddings, "_FEWEST_ROWS_OF_A_PART", 3)
    monkeypatch.setattr(embeddings, "_PARTS", 100)
    words = ["encode", str(inputs / "embedder"), str(inputs / "data" / "train-*.tar")]
    assert main([*words, "whole"]) == 0
    embedded = []
    encode_parts = embeddings.encode_parts

    def counted_parts(*arguments: Any, **keys: Any) -> Any:
        for number, e_nD in encode_parts(*arguments, **keys):
            if len(embedded) == 5:
                raise KeyboardInterrupt
            embedded.append(len(e_nD))
            yield number, e_nD

    monkeypatch.setattr(embeddings, "encode_parts", counted_parts)
    assert main([*words, "killed"]) == 130
    assert not (Path("killed") / DONE).exists()
    parts = {path: path.stat().st_mtime_ns for path in Path("killed/parts").glob("*.npy")}
    monkeypatch.setattr(embeddings, "encode_parts", encode_parts)
    kept = {path.name: path.read_bytes() for path in parts if path.name.startswith("queries-0")}
    assert len(kept) == 5
    assert main([*words, "killed"]) == 0
    assert not Path("killed/parts").exists()
    for name in ("documents.npy", "queries.npy", "document-ids.txt", "query-ids.txt", "qrels.txt"):
        assert (Path("killed") / name).read_bytes() == (Path("whole") / name).read_bytes()
    before = len(started)
    assert main([*words, "killed"]) == 0
    assert len(started) == before and "nothing is left to do" in capsys.readouterr().out
    os.truncate("killed/documents.npy", 100)
    assert main([*words, "killed"]) == 0
    assert len(started) == before + 1
    assert main([*words, "killed", "--precision", "int8"]) == 0
    assert open_collection(Path("killed")).precision == "int8"


def test_what_is_embedded_stays_until_there_is_something_else(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the model is the same model; and an encoding that is stopped has not touched what was there."""
    started = encode_here(monkeypatch)
    words = ["encode", "model", str(inputs / "data" / "train-*.tar"), "out"]
    shutil.copytree(inputs / "embedder", "model")
    assert main(words) == 0
    made = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.npy")}
    for path in Path("model").iterdir():
        os.utime(path, (1, 1))
    assert main(words) == 0
    assert len(started) == 2 and "by the same weights, of the same shards" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.npy")} == made
    assert main(words) == 0
    assert len(started) == 2 and "nothing is left to do" in capsys.readouterr().out
    # Other pixels, other embeddings: stopped at the first of them.
    with monkeypatch.context() as stopped:
        stopped.setattr(embeddings, "encode_parts", _interrupt)
        assert main([*words, "model.max_pixels=4096"]) == 130
    assert main(words) == 0
    assert len(started) == 3 and "nothing is left to do" in capsys.readouterr().out
    assert main([*words, "model.max_pixels=4096"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.npy")} != made


def test_of_two_at_once_the_second_changes_nothing(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its launch may begin while the first one's ranks are started: they know what they are to do."""
    encode_here(monkeypatch)
    shards = str(inputs / "data" / "eval-*.tar")
    supervise = local.supervise
    codes = []

    def second_comes_first(command: Any, *rest: Any, **keys: Any) -> int:
        with monkeypatch.context() as inside, claimed(RunFolder(Path("out"))):
            inside.setattr(local, "supervise", supervise)
            codes.append(main(["encode", str(inputs / "embedder"), shards, "out", "model.max_pixels=4096"]))
        return supervise(command, *rest, **keys)

    monkeypatch.setattr(local, "supervise", second_comes_first)
    words = ["encode", str(inputs / "embedder"), shards, "out"]
    assert main(words) == 0
    assert codes == [2] and "another run is writing into out" in capsys.readouterr().err
    monkeypatch.setattr(local, "supervise", supervise)
    assert main([*words[:3], "alone"]) == 0
    for name in ("documents.npy", "queries.npy", "encode.yaml"):
        found = (Path("alone") / name).read_bytes().replace(b"output_dir: alone", b"output_dir: out")
        assert (Path("out") / name).read_bytes() == found


def test_what_is_half_written_is_not_measured(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_here(monkeypatch)
    words = ["encode", str(inputs / "embedder"), str(inputs / "data" / "eval-*.tar"), "out"]
    assert main(words) == 0
    with monkeypatch.context() as broken:
        broken.setattr(collection_writing, "_write_queries", _interrupt)
        assert main([*words, "model.max_pixels=4096"]) == 130
    with pytest.raises(UserError, match="the embeddings in out are not all there"):
        open_collection(Path("out"))
    assert main([*words, "model.max_pixels=4096"]) == 0
    assert load_config(Path("out/encode.yaml")).model.max_pixels == 4096
    open_collection(Path("out"))


def _interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_corpus_is_embedded_without_queries(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_here(monkeypatch)
    _, pages = _pairs(inputs / "data" / "eval-000000.tar")
    with webdataset.TarWriter("corpus with a blank.tar") as tar:
        for key, page in pages.items():
            stream = io.BytesIO()
            page.save(stream, "PNG")
            tar.write({"__key__": f"doc {key}", "png": stream.getvalue()})
    words = ["encode", str(inputs / "embedder")]
    assert main([*words, str(inputs / "data" / "eval-*.tar"), "out"]) == 0
    assert open_collection(Path("out")).query_ids
    assert main([*words, "corpus with a blank.tar", "out"]) == 0
    found = open_collection(Path("out"))
    assert sorted(found.document_ids) == sorted(f"doc%20{key}" for key in pages)
    assert not found.query_ids and not Path("out/queries.npy").exists()


def test_models_beside_a_run_are_measured_as_the_run_measured_its_own(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its export, its dims, its shards and its pixels; its base model has the figures from before training."""
    encode_here(monkeypatch)
    data = {"eval": str(inputs / "data" / "eval-*.tar")}
    model = {"max_pixels": 2048, "prompts": {"query": "find: ", "document": ""}}
    summary = farnear.train(run_config(inputs, "run", data=data, model=model, training={"max_steps": 2}))
    words = [str(inputs / name) for name in ("base", "run", "embedder")]
    assert main(["compare", *words, "--resamples", "100"]) == 0
    assert "run against base" in capsys.readouterr().out

    def measured(name: str) -> dict[str, float]:
        results = json.loads(Path(f"evaluation/{name}/results.json").read_text())["results"]
        return {str(row["dim"]): round(row["ndcg@10"], 4) for row in results}

    assert measured("run") == summary["ndcg@10_by_dim"]
    assert measured("base") == summary["ndcg@10_by_dim_before"]
    # A model that is not the run's own keeps its prompts, and sees pages of the same size.
    assert load_config(Path("evaluation/embedder/embeddings/encode.yaml")).model.max_pixels == 2048
    assert load_config(Path("evaluation/embedder/embeddings/encode.yaml")).model.prompts is None
    assert main(["evaluate", words[0], "--data", data["eval"], "--out", "alone"]) == 0
    alone = json.loads(Path("alone/base/results.json").read_text())["results"][0]
    assert round(alone["ndcg@10"], 4) != measured("base")["64"], "pages of another size would be seen"


def test_a_checkpoint_is_exported_and_evaluated(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = encode_here(monkeypatch)
    data = {"eval": str(inputs / "data" / "eval-*.tar")}
    for name, seed in (("first", 1), ("second", 2)):
        config = run_config(inputs, name, data=data, training={"max_steps": 2}, seed=seed)
        farnear.train(config)

    def evaluated(*models: Path) -> list[dict[str, float]]:
        assert main(["evaluate", *map(str, models)]) == 0
        found = [
            json.loads(path.read_text())["results"][0] for path in sorted(Path("evaluation").glob("*/results.json"))
        ]
        return [{name: row[name] for name in row if "@" in name} for row in found]

    steps = [inputs / "first" / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    whole, before, after = evaluated(inputs / "first", *steps)
    assert after == whole != before
    # What is called alike is another run's, and embedded anew; what is the same is not.
    count = len(started)
    other = inputs / "second" / "checkpoints" / "step-00000002"
    *_, of_other = evaluated(inputs / "first", steps[0], other)
    assert len(started) == count + 1 and of_other != after
    assert evaluated(inputs / "first" / "latest")
    latest = json.loads(Path("evaluation/latest/results.json").read_text())["results"][0]
    assert {name: latest[name] for name in whole} == whole
    capsys.readouterr()
    os.truncate(next(steps[1].glob("*.safetensors")), 100)
    assert main(["evaluate", str(steps[1])]) == 2
    assert "step-00000002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "no model is named"),
        (["evaluate", "base"], "no shards are named"),
        (["evaluate", "BASE", "--data", "nothing-*.tar"], "nothing-*.tar"),
        (["evaluate", "nowhere/base", "--data", "SHARDS"], "nowhere/base"),
        (
            ["encode", "BASE", "SHARDS", "out", "--truncate_dim", "65"],
            "embeddings of 64 components cannot be cut to 65",
        ),
        (
            ["encode", "BASE", "SHARDS", "out", "--truncate_dim", "12", "--precision", "binary"],
            "12 is no multiple of 8",
        ),
        (["encode", "BASE", "SHARDS", "out", "model.max_pixel=3"], "did you mean 'model.max_pixels'"),
        (
            ["evaluate", "--data", "SHARDS", "BASE"],
            "no model is named; name a folder, a model on the hub, or a run, and",
        ),
        (["encode", "BASE", "SHARDS", "out", "--corpus", "SHARDS", "model.max_pixel=3"], "'model.max_pixels'"),
        (["encode", "BASE", "SHARDS", "other"], "other holds other files"),
        (["encode", "BASE", "SHARDS", "other/file"], "is a file"),
    ],
)
def test_mistakes_take_one_line(
    words: list[str], message: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_here(monkeypatch)
    Path("other").mkdir()
    Path("other/file").write_text("of somebody else")
    replaced = {"SHARDS": str(inputs / "data" / "eval-*.tar"), "BASE": str(inputs / "embedder")}
    assert main([replaced.get(word, word) for word in words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert Path("other/file").read_text() == "of somebody else"
