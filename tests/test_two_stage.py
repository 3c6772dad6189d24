"""Two stages, trained, measured and mined with: the figures are sentence-transformers' own on the same models."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from pair_makers import TEMPLATE, YES_NO
from ranks import run_ranks
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tar_makers import STORE, index_of
from tiny_runs import run_config

import farnear
from farnear.data.document_names import DocumentNames
from farnear.data.index import Index
from farnear.data.read import InputReader
from farnear.errors import UserError
from farnear.ingest.synthetic import synthesise
from farnear.launching.mining import inputs_of, is_done
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.retrieve.evaluate import build_task
from farnear.retrieve.measure import measure
from farnear.retrieve.rerank import NO_CANDIDATE, given_candidates, reranked
from farnear.sections import ModelConfig
from farnear.training.mine_ranks import mine_on_ranks, mining_config

K = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-stage")
    synthesise(folder / "data", train_pairs=22, eval_pairs=12, seed=0, size=(64, 64))
    save_tiny_model(folder / "base", texts=YES_NO, hidden_size=64, num_layers=2)
    load_model(ModelConfig(name_or_path=str(folder / "base"))).save_pretrained(str(folder / "embedder"))
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def reranker_run(folder: Path, output_dir: str, **keys: Any) -> Any:
    """Two steps of a reranker whose candidates an embedder finds."""
    return run_config(
        folder,
        output_dir,
        loss={"matryoshka_dims": None},
        data={"eval": str(folder / "data" / "eval-*.tar")},
        training={"max_steps": 2, "learning_rate": 1e-2},
        evaluation={"embedder": str(folder / "embedder"), "rerank_k": K, "eval_steps": 1, "sample_queries": 4},
        reranker={"chat_template": str(folder / "template.jinja"), "num_negatives": 2, "instruction": "Judge."},
        **keys,
    )


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    farnear.train(reranker_run(folder, "reranker"))
    return folder / "reranker"


def test_a_gallery_ranks_as_was_measured(trained: Path) -> None:
    measured = [json.loads(line) for line in (trained / "eval.jsonl").read_text().splitlines()]
    for kind, record in (("before", measured[0]), ("after", measured[-1])):
        head, *queries = [json.loads(line) for line in (trained / "gallery" / f"{kind}.jsonl").read_text().splitlines()]
        assert (head["step"], head["looked_at"], head["queries"]) == (record["step"], K, 12)
        ranks = [query["rank"] for query in queries if query["rank"]]
        assert sum(1 / rank for rank in ranks) / 12 == pytest.approx(record["metrics"]["1"]["mrr@10"])
    assert "after training</h4>" in (trained / "report.html").read_text()


def test_each_stage_has_the_figures_of_sentence_transformers(folder: Path, trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "eval.jsonl").read_text().splitlines()]
    kinds = [(record["kind"], record["step"]) for record in records]
    assert kinds == [("before", 0), ("during", 1), ("during", 2), ("after", 2)]
    assert all(record["embedder"] == records[0]["embedder"] for record in (records[0], records[3]))
    last = records[-1]
    assert last["pairs"] == K * 12
    assert all(0 < last["seconds_per_query"][stage] < 60 for stage in ("embedder", "reranker"))

    index, store = index_of(sorted((folder / "data").glob("eval-*.tar"))), STORE
    task, reader = build_task(index, store), InputReader(index, store)
    queries = {str(q): reader[int(index.query_N[pair])] for q, pair in enumerate(task.query_pair_Q)}
    pages = {str(p): reader[int(row)] for p, row in enumerate(task.page_row_P)}
    relevant = {str(q): {str(p) for p in of_query} for q, of_query in enumerate(task.relevant)}
    embedder = SentenceTransformer(str(folder / "embedder"), device="cpu")
    at: dict[str, Any] = {"ndcg_at_k": [1, 5, 10], "precision_recall_at_k": [1, 5, 10], "write_csv": False}
    of_embedder = InformationRetrievalEvaluator(queries, pages, relevant, **at)(embedder)
    for name, value in last["embedder"].items():
        kind, k = name.split("@")
        assert value == pytest.approx(of_embedder[f"cosine_{kind}@{k}"], abs=1e-6), name

    similarity_QP = embedder.similarity(
        embedder.encode_query(list(queries.values())), embedder.encode_document(list(pages.values()))
    )
    nearest_Qk = similarity_QP.argsort(dim=1, descending=True)[:, :K].tolist()
    model = CrossEncoder(str(trained / "export"), device="cpu")
    scores = [model.predict([(queries[str(q)], pages[str(p)]) for p in near]) for q, near in enumerate(nearest_Qk)]
    found = evaluated_by_sentence_transformers(nearest_Qk, np.array(scores), task.relevant)
    for name in ("ndcg@10", "mrr@10"):
        assert last["metrics"]["1"][name] == pytest.approx(found[name], abs=1e-6), name


def evaluated_by_sentence_transformers(candidate_Qk: Any, score_Qk: np.ndarray, relevant: Any) -> dict[str, float]:
    class Scores:
        """Stands where sentence-transformers has a CrossEncoder."""

        def __init__(self) -> None:
            self.model_card_data = self

        def set_evaluation_metrics(self, *_: Any) -> None:
            pass

        def predict(self, pairs: Any, **_: Any) -> np.ndarray:
            place_of = [{str(page): place for place, page in enumerate(pages)} for pages in candidate_Qk]
            return np.array([score_Qk[int(query), place_of[int(query)][page]] for query, page in pairs])

    samples = [
        {"query": str(query), "positive": [str(page) for page in relevant[query]], "documents": [*map(str, pages)]}
        for query, pages in enumerate(candidate_Qk)
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, at_k=10, always_rerank_positives=False, write_csv=False)
    return evaluator(Scores())  # type: ignore[arg-type, no-any-return]


def test_measures_of_a_reranking_are_those_of_sentence_transformers() -> None:
    """Any candidates, with and without the page that answers; where several do, with all of them."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        queries, pages, k = 6, 30, int(generator.integers(2, 20))
        candidate_Qk = np.stack([generator.permutation(pages)[:k] for _ in range(queries)])
        relevant = [
            frozenset(candidate_Qk[q, :2].tolist() if q % 2 else [int(generator.integers(pages))])
            for q in range(queries)
        ]
        score_Qk = generator.permutation(queries * k).reshape(queries, k).astype(np.float32)
        ours = measure(reranked(candidate_Qk, score_Qk.ravel())[0], relevant)
        theirs = evaluated_by_sentence_transformers(candidate_Qk.tolist(), score_Qk, relevant)
        for name in ("ndcg@10", "mrr@10"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6)


def test_candidates_without_an_embedder_hold_what_answers_and_fill_up(folder: Path) -> None:
    task = build_task(index_of(sorted((folder / "data").glob("eval-*.tar"))), STORE)
    for k in (3, 10, 20):
        candidate_Qk = given_candidates(task, k)
        for query, pages in enumerate(candidate_Qk.tolist()):
            there = [page for page in pages if page != NO_CANDIDATE]
            assert len(there) == len(set(there)) == min(k, task.pages)
            assert task.relevant[query] <= set(there)


def teacher_scores(path: Path, index: Index) -> dict[tuple[int, int], float]:
    """(pair, input row) -> score, of all that a file of negatives holds."""
    names = DocumentNames(index)
    scores = {}
    for pair, line in enumerate(json.loads(text) for text in path.read_text().splitlines()[1:]):
        rows = names.rows(pa.array(line["neg_ids"], pa.large_string()))
        scores |= {(pair, int(row)): s for row, s in zip(rows, line["neg_teacher"], strict=True)}
        scores |= {(pair, int(row)): s for row, s in zip(index.positives_of(pair), line["pos_teacher"], strict=True)}
    return scores


def mine_there(rank: int, world_size: int, folder: Path, name: str, **mining: Any) -> None:
    mining["reranker"] = str(folder / "reranker" / "export")
    config = run_config(
        folder,
        "mining",
        strategy="ddp" if world_size > 1 else "single",
        mining=mining,
        evaluation={"per_device_eval_batch_size": 7},
    )
    mine_on_ranks(mining_config(config), folder / name, "inputs")


def veto_there(rank: int, world_size: int, folder: Path) -> None:
    mine_there(rank, world_size, folder, "vetoed", reranker_margin=0.0, num_negatives=3)


def score_all_there(rank: int, world_size: int, folder: Path) -> None:
    mine_there(rank, world_size, folder, "scored", reranker_margin=None, num_negatives=21)


def test_a_reranker_judges_what_is_mined(folder: Path, trained: Path) -> None:
    """Its raw scores stand in the file, the same for one rank and two, and its veto is kept to."""
    index = index_of(sorted((folder / "data").glob("train-*.tar")))
    run_ranks(score_all_there, 1, folder)
    run_ranks(veto_there, 2, folder)
    scored, vetoed = (teacher_scores(folder / name / "negatives.jsonl", index) for name in ("scored", "vetoed"))
    assert len(scored) == len(index) ** 2
    reader = InputReader(index, STORE)
    keys = list(scored)[::23]
    model = CrossEncoder(str(trained / "export"), device="cpu")
    pairs = [(reader[int(index.query_N[pair])], reader[row]) for pair, row in keys]
    theirs = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.abs(np.array([scored[key] for key in keys]) - theirs).max() < 1e-5

    assert all(vetoed[key] == pytest.approx(scored[key], abs=1e-5) for key in vetoed)
    for pair in range(len(index)):
        positive = int(index.positives_of(pair)[0])
        limit = scored[pair, positive]
        wanted = sum(score <= limit - 1e-5 for (p, row), score in scored.items() if p == pair and row != positive)
        kept = [score for (p, row), score in vetoed.items() if p == pair and row != positive]
        assert len(kept) >= min(3, wanted)
        assert all(score <= limit + 1e-5 for score in kept)
    report = json.loads((folder / "vetoed" / "report.json").read_text())
    assert report["fell"]["reranker_margin"] > 0
    assert report["reranker"]["name"] == str(trained / "export")


def test_an_embedder_and_a_reranker_are_not_taken_for_each_other(folder: Path, trained: Path) -> None:
    embedder, reranker = str(folder / "embedder"), str(trained / "export")
    config = reranker_run(folder, "refused")
    swapped = config.evaluation.model_copy(update={"embedder": reranker})
    with pytest.raises(UserError, match=r"evaluation.embedder: model .* is a CrossEncoder.*; set evaluation.embedder"):
        farnear.train(config.model_copy(update={"evaluation": swapped}))
    with pytest.raises(UserError, match=r"mining.reranker: model .* is an embedder, which judges no pairs"):
        mine_on_ranks(
            mining_config(run_config(folder, "mining", mining={"reranker": embedder})), folder / "refused-1", "inputs"
        )
    with pytest.raises(UserError, match="is a CrossEncoder, which scores pairs and embeds nothing"):
        mine_on_ranks(
            mining_config(run_config(folder, "mining", model={"name_or_path": reranker})),
            folder / "refused-2",
            "inputs",
        )


def test_a_mining_is_done_while_all_that_it_left_is_there(folder: Path) -> None:
    config = run_config(folder, "mining", mining={"num_negatives": 2})
    to = folder / "done-or-not"
    mine_on_ranks(mining_config(config), to, inputs_of(config))
    assert is_done(to, inputs_of(config))
    assert not is_done(to, inputs_of(config.model_copy(update={"seed": 1})))
    # What a training alone reads decides nothing here.
    refreshing = config.mining.model_copy(update={"refresh_every": 5.0})
    assert is_done(to, inputs_of(config.model_copy(update={"mining": refreshing})))
    part = to / "embeddings" / "queries-00000.npy"
    content = part.read_bytes()
    for damage in (lambda: part.write_bytes(content[:-1]), part.unlink):
        damage()
        assert not is_done(to, inputs_of(config))
        part.write_bytes(content)
    # Another one in the folder takes the place of the first when it begins to mine, and not before.
    for part_of_it, is_there in (("open_data", True), ("mine_judged", False)):
        with (
            patch(f"farnear.training.mine_ranks.{part_of_it}", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            mine_on_ranks(mining_config(config), to, "others")
        assert is_done(to, inputs_of(config)) == is_there


def test_a_model_beside_that_is_none_is_told_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    config = reranker_run(folder, "refused")
    nowhere = config.evaluation.model_copy(update={"embedder": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere") as caught:
        farnear.train(config.model_copy(update={"evaluation": nowhere}))
    assert "\n" not in str(caught.value)
    assert not (folder / "refused" / "metrics.jsonl").exists()
