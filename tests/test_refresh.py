"""Mining again during a run: what is mined is used, and a run that is ended anywhere goes on to the same end."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pair_makers import TEMPLATE
from ranks import run_ranks
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tar_makers import STORE, image_bytes, write_tar
from tiny_runs import cut_back, losses, make_inputs, run_config

from farnear.config import RunConfig
from farnear.data.index import Index
from farnear.data.negatives import AnswersOfQueries
from farnear.data.negatives_file import read_negatives
from farnear.data.read import InputReader
from farnear.errors import RunInterruptedError, UserError
from farnear.model.load_reranker import load_plain_reranker
from farnear.parallel.world import World, start_world, stop_world
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig
from farnear.signals import Signals
from farnear.training import engine
from farnear.training.choices import choose
from farnear.training.loop import train_step
from farnear.training.opening import open_run
from farnear.training.quarantine import Quarantine
from farnear.training.run import train_in
from farnear.training.shards import open_data
from farnear.training.watch import Watch

ALONE = World(0, 1, torch.device("cpu"))
FIRST = Path("mined") / "step-00000002" / "negatives.jsonl"
SECOND = Path("mined") / "step-00000004" / "negatives.jsonl"


def config_of(folder: Path, output_dir: str, **keys: Any) -> RunConfig:
    """Six steps; mined after the second and the fourth, and not after the sixth."""
    mining = {"refresh_every": 2, "num_negatives": 3, "range_max": 8, **keys.pop("mining", {})}
    return run_config(folder, output_dir, mining=mining, **{"data": {"num_negatives": 2}, **keys})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("refresh"))


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    config = config_of(folder, "unused")
    return open_data(config.data, config.evaluation, ALONE).train


@pytest.fixture(scope="module")
def batches(folder: Path) -> list[Any]:
    """Those of the run `whole`, which has a data worker."""
    seen: list[Any] = []

    def noted(parts: Any, batch: Any) -> dict[str, Any]:
        seen.append(batch)
        return train_step(parts, batch)

    config = config_of(folder, "whole", data={"num_negatives": 2, "dataloader_num_workers": 1})
    with patch("farnear.training.loop.train_step", noted):
        train_in(ALONE, config)
    return seen


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_negatives_of_a_step_are_those_that_were_mined_last(
    folder: Path, index: Index, batches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    of_step: list[Any] = [None, None, *[FIRST] * 2, *[SECOND] * 2]
    for path, batch in zip(of_step, batches, strict=True):
        negatives = read_negatives([str(folder / "whole" / path)], index, 0.0) if path else None
        hard_p = slice(len(batch.pairs_b), None)
        for place, pair in enumerate(batch.pairs_b.tolist()):
            used = batch.page_hash_p[hard_p][batch.owner_p[hard_p] == place]
            expected = index.input_hash_I[negatives.of(pair)[:2]] if negatives else []
            assert used.tolist() == list(expected) and len(used) == (2 if path else 0)
            assert not set(used.tolist()) & set(index.positive_hashes_of_query(pair).tolist())
    assert (folder / "whole" / FIRST).read_bytes() != (folder / "whole" / SECOND).read_bytes()
    records = lines(folder / "whole" / "mined.jsonl")
    assert [(one["step"], one["pairs"], one["negatives"]) for one in records] == [(2, 22, 66), (4, 22, 66)]
    assert all(one["seconds"] >= sum(one["phases"].values()) - 0.05 for one in records)
    assert {path.name for path in (folder / "whole" / FIRST).parent.iterdir()} == {
        "negatives.jsonl", "negatives.lock", "report.json", "examples.html"
    }  # fmt: skip


def test_they_are_the_nearest_by_the_weights_of_the_step(folder: Path, index: Index, batches: list[Any]) -> None:
    """By sentence-transformers, which is given the weights that were saved after the step."""
    model = SentenceTransformer(str(folder / "whole" / "export"), device="cpu")
    reader, pages = InputReader(index, STORE), index.positives
    pairs, answers = np.arange(len(index)), AnswersOfQueries(index)
    for path in (FIRST, SECOND):
        saved = load_file(folder / "whole" / "checkpoints" / path.parent.name / "rank-00000.0.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[f"weight/0/model.{name}"].view_as(parameter))
        query_ND = model.encode_query([reader[row] for row in index.query_N], normalize_embeddings=True)
        page_ND = model.encode_document([reader[row] for row in pages], normalize_embeddings=True)
        cosine_NN = query_ND @ page_ND.T
        for pair, line in zip(pairs, lines(folder / "whole" / path)[1:], strict=True):
            is_answer = answers.answers(np.full(len(pages), pair), pages)
            _, first = np.unique(index.input_hash_I[pages], return_index=True)
            others = np.setdiff1d(first, np.flatnonzero(is_answer))
            nearest = np.sort(cosine_NN[pair, others])[::-1][:3]
            np.testing.assert_allclose(line["neg_similarity"], nearest, atol=1e-4)
        assert np.ptp(cosine_NN) > 1e-2


def test_without_it_a_run_is_another(folder: Path, batches: list[Any]) -> None:
    train_in(ALONE, run_config(folder, "never"))
    never, whole = losses(folder / "never"), losses(folder / "whole")
    assert never[:2] == whole[:2] and all(a != b for a, b in zip(never[2:], whole[2:], strict=True))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resume_goes_on_to_the_same_end(folder: Path, batches: list[Any], step: int) -> None:
    run = cut_back(folder / "whole", step, f"from-{step}")
    if step < 3:
        shutil.rmtree(run / "mined")
    train_in(ALONE, config_of(folder, run.name), "newest")
    assert losses(run) == losses(folder / "whole")
    for path in (FIRST, SECOND):
        assert (run / path).read_bytes() == (folder / "whole" / path).read_bytes()
    assert [one["step"] for one in lines(run / "mined.jsonl")] == [2, 4]


@pytest.mark.parametrize("is_there", [True, False])
def test_another_file_than_the_checkpoint_knew_is_refused(folder: Path, batches: list[Any], is_there: bool) -> None:
    run = cut_back(folder / "whole", 3, f"other-{is_there}")
    text = (run / FIRST).read_text()
    (run / FIRST).unlink()
    if is_there:
        head, _, *rest = text.splitlines(keepends=True)
        (run / FIRST).write_text("".join([head, *rest]))
    before = (run / "metrics.jsonl").read_text()
    why = "is not what it was" if is_there else "is missing"
    with pytest.raises(UserError, match=f"step-00000003 was .* of .*{FIRST}, which {why}.*; restore the file, or") as e:
        train_in(ALONE, config_of(folder, run.name), "auto")
    assert "\n" not in str(e.value) and e.value.exit_code == 2
    assert (run / "metrics.jsonl").read_text() == before


class KilledError(BaseException):
    """What ends a training as a kill would, but for the process."""


def at_mining(of_step: int, calls: int, then: Any) -> Any:
    """Do something as the mining of a step has come so far."""
    real, left = Watch.at, iter(range(calls))

    def at(watch: Watch, phase: str, **places: Any) -> None:
        real(watch, phase, **places)
        if phase == "mining" and places["step"] == of_step and next(left, None) is None:
            then()

    return patch.object(Watch, "at", at)


@pytest.mark.parametrize(("save_steps", "resume"), [(1, "newest"), (3, "auto"), (3, "newest")])
def test_a_kill_in_the_middle_changes_nothing(folder: Path, batches: list[Any], save_steps: int, resume: Any) -> None:
    """Of the first mining with and without a checkpoint of its step, or of any; of the second."""
    of_step = 2 if resume == "auto" or save_steps == 1 else 4
    config = config_of(folder, f"killed-{save_steps}-{of_step}", training={"save_steps": save_steps})

    def kill() -> None:
        raise KilledError

    with at_mining(of_step, 5, kill), pytest.raises(KilledError):
        train_in(ALONE, config)
    run = Path(config.output_dir)
    assert (run / "mined" / f"step-{of_step:08d}" / "embeddings").exists()
    # Nor does one between the mining and the next checkpoint.
    real = train_step

    def killed(parts: Any, batch: Any) -> dict[str, Any]:
        if batch.step == of_step:
            kill()
        return real(parts, batch)

    with patch("farnear.training.loop.train_step", killed), pytest.raises(KilledError):
        train_in(ALONE, config, resume)
    assert [one["step"] for one in lines(run / "mined.jsonl")] == list(range(2, of_step + 1, 2))
    train_in(ALONE, config, resume)
    assert losses(run) == losses(folder / "whole")
    assert [one["step"] for one in lines(run / "mined.jsonl")] == [2, 4]
    assert not list(run.glob("mined/*/embeddings")) and not list(run.glob("mined/*/parts"))


def test_a_signal_in_the_middle_stops_the_run_in_good_order(folder: Path, batches: list[Any]) -> None:
    config, signals = config_of(folder, "signalled", training={"save_steps": 5}), Signals()

    def come() -> None:
        signals.first = signal.SIGTERM

    with (
        at_mining(4, 5, come),
        pytest.raises(RunInterruptedError, match=r"SIGTERM at rank 0 after step 4, saved in step-00000004; .*--resume"),
    ):
        train_in(ALONE, config, None, signals)
    run = folder / "signalled"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    train_in(ALONE, config, "newest")
    assert losses(run) == losses(folder / "whole")
    assert (run / SECOND).read_bytes() == (folder / "whole" / SECOND).read_bytes()


def train_and_resume(rank: int, world_size: int, folder: Path) -> None:
    config = config_of(folder, "of-two", strategy="fsdp2")
    world = start_world(config)
    train_in(world, config)
    if rank == 0:
        shutil.rmtree(cut_back(folder / "of-two", 2, "of-two-again") / "mined")
    torch.distributed.barrier()
    train_in(world, config_of(folder, "of-two-again", strategy="fsdp2"), "newest")
    stop_world()


def test_on_two_ranks_whose_weights_are_spread_and_from_two_to_one(folder: Path, batches: list[Any]) -> None:
    run_ranks(train_and_resume, 2, folder, seconds=120)
    of_two = losses(folder / "of-two")
    assert losses(folder / "of-two-again") == of_two
    ids = [[one["neg_ids"] for one in lines(folder / run / FIRST)[1:]] for run in ("whole", "of-two")]
    assert ids[0] == ids[1]
    for (_, loss, _), (_, other, _) in zip(of_two, losses(folder / "whole"), strict=True):
        assert loss == pytest.approx(other, rel=1e-3)
    run = cut_back(folder / "of-two", 3, "of-one")
    assert (run / FIRST).read_bytes() == (folder / "of-two" / FIRST).read_bytes()
    train_in(ALONE, config_of(folder, "of-one"), "newest")
    for (_, loss, _), (_, other, _) in zip(of_two, losses(run), strict=True):
        assert loss == pytest.approx(other, rel=1e-3)


def test_memory_is_shared_out_for_the_negatives_to_come(folder: Path) -> None:
    asked: list[Any] = []

    def noted(*arguments: Any, **keys: Any) -> Any:
        asked.append(keys["inputs_per_rank"])
        return choose(*arguments, **keys)

    with patch.object(engine, "choose", noted):
        for most, mining in ((None, {}), (2, {}), (5, {}), (None, {"refresh_every": None})):
            open_run(config_of(folder, "unused", data={"num_negatives": most}, mining=mining), None, ALONE)
    assert [one["document"] for one in asked] == [8 * 4, 8 * 3, 8 * 4, 8]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": {"distillation": "margin_mse"}}, "finds has none of without mining.reranker; name one"),
        ({"data": {"num_negatives": 0}}, "data.num_negatives: 0 has none of them used"),
        (
            {"reranker": {}, "loss": {"matryoshka_dims": None}},
            "an embedder mine with its own weights, which a reranker",
        ),
    ],
)
def test_what_it_cannot_do_is_said(folder: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(folder, "unused", **keys)


def test_an_input_that_cannot_be_read_is_left_out_as_in_the_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page whose pair the training quarantines when its turn comes; a teacher judges the others."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    head = RerankerConfig(head="linear", chat_template=str(template))
    load_plain_reranker(ModelConfig(name_or_path=str(folder / "base")), head).save_pretrained(str(folder / "teacher"))
    broken = folder / "broken.tar"
    members = [("a.json", b'{"query": "where"}'), ("a.png", image_bytes(1)[:60] + bytes(900))]
    members += [("b.json", b'{"query": "who"}'), ("b.png", image_bytes(2))]
    write_tar(broken, members)
    data = {"train": [str(folder / "data" / "train-*.tar"), str(broken)], "max_bad_fraction": 0.1, "num_negatives": 1}
    mining = {"num_negatives": 30, "range_max": 40, "reranker": str(folder / "teacher"), "reranker_margin": None}
    loss = {"distillation": "margin_mse"}
    config = config_of(folder, "broken", data=data, mining=mining, loss=loss)
    train_in(ALONE, config)
    run = folder / "broken"
    assert [one["input"] for one in lines(run / "quarantine.jsonl")] == ["broken.tar/a.png"]
    for path in (FIRST, SECOND):
        assert json.loads((run / path).with_name("report.json").read_text())["unusable"] == ["broken.tar/a.png"]
    assert "left out that cannot be used" in capsys.readouterr().out
    # The first two steps have no teacher yet.
    distilled = [bool(record["distilled"]) for record in lines(run / "metrics.jsonl")]
    assert distilled[:2] + distilled[3:] == [False, False, True, True, True]
    found = lines(run / FIRST)[1:]
    scored = [all(score is not None for score in one["pos_teacher"] + one["neg_teacher"]) for one in found]
    assert [one["key"] for one, is_scored in zip(found, scored, strict=True) if not is_scored] == ["a"]
    # All that may be a negative is one here.
    named = {name.split("/")[-1] for one in found for name in one["neg_ids"]}
    assert named == {f"{one['key']}.png" for one in found} - {"a.png"}
    data["max_bad_fraction"] = 0.01
    with (
        patch.object(Quarantine, "stop_if_too_many"),
        pytest.raises(UserError, match=r"1 of 24 documents cannot be read .*, above data.max_bad_fraction \(0.01\)"),
    ):
        train_in(ALONE, config_of(folder, "too-broken", data=data, mining=mining, loss=loss))
