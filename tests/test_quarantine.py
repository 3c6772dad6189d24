"""Pairs that cannot be used: counted before the first step, masked and named while training, too many stop the run."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tar_makers import index_of, write_pairs, write_tar
from tiny_runs import make_inputs, run_config

import farnear
from farnear.data.batch import Quarantined
from farnear.data.losses import Losses, losses_of
from farnear.data.run_shards import read_exclusions, resolve_exclusions
from farnear.errors import RunStoppedError, UserError
from farnear.parallel.world import World, start_world, stop_world
from farnear.training.quarantine import Quarantine
from farnear.training.run import train_in
from farnear.training.shards import check_index, tell_faults

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pairs, two of whose pages break off in the middle: their headers are whole."""
    folder = make_inputs(tmp_path_factory.mktemp("quarantine"))
    broken = folder / "broken"
    broken.mkdir()
    members = []
    (shard,) = (folder / "data").glob("train-*.tar")
    with tarfile.open(shard) as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            is_broken = member.name in ("train-000003.png", "train-000011.png")
            members.append((member.name, data[: len(data) // 2] if is_broken else data))
    write_tar(broken / "train-0.tar", members)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys_with(folder: Path, max_bad_fraction: float, **training: Any) -> dict[str, Any]:
    data = {"train": str(folder / "broken" / "*.tar"), "max_bad_fraction": max_bad_fraction}
    return {"data": data, "training": training}


def train_with_broken_pages(rank: int, world_size: int, folder: Path) -> None:
    world = start_world(run_config(folder, "unused", strategy="ddp"))
    train_in(world, run_config(folder, "ddp", strategy="ddp", **keys_with(folder, 0.1)))
    with pytest.raises(RunStoppedError, match=r"2 of 22 pairs cannot be used, above data.max_bad_fraction \(0.05\)"):
        train_in(world, run_config(folder, "stops", strategy="ddp", **keys_with(folder, 0.05)))
    stop_world()


@pytest.fixture(scope="module")
def trained_by_two(folder: Path) -> Path:
    """The folder with the runs of ``train_with_broken_pages``."""
    run_ranks(train_with_broken_pages, 2, folder)
    return folder


def test_ranks_go_on_without_what_cannot_be_decoded_or_stop_together(trained_by_two: Path) -> None:
    folder = trained_by_two
    records = lines(folder / "ddp" / "quarantine.jsonl")
    assert {(one["shard"], one["key"]) for one in records} == {
        (str(folder / "broken" / "train-0.tar"), "train-000003"),
        (str(folder / "broken" / "train-0.tar"), "train-000011"),
    }
    assert len(records) == 2 and all("cannot be decoded" in one["reason"] for one in records)
    assert json.loads((folder / "ddp" / "summary.json").read_text())["quarantined"] == 2
    steps = lines(folder / "ddp" / "metrics.jsonl")
    # Each of the two epochs meets them again; the file names them once.
    assert sum(step["quarantined"] for step in steps) == 4
    assert sum(step["pairs"] for step in steps) == 2 * (22 - 2)
    assert {one["step"] for one in records} == {step["step"] for step in steps[:3] if step["quarantined"]}
    assert all(1.0 <= step["longest_rank"] <= 2.0 for step in steps)
    stopped = lines(folder / "stops" / "metrics.jsonl")
    assert len(stopped) <= 3 and stopped[-1]["quarantined"]


def test_one_process_gets_the_same_losses_with_other_workers(trained_by_two: Path) -> None:
    folder = trained_by_two
    keys = keys_with(folder, 0.1)
    keys["data"]["dataloader_num_workers"] = 2
    farnear.train(run_config(folder, "alone", **keys))
    losses = [[step["loss"] for step in lines(folder / name / "metrics.jsonl")] for name in ("ddp", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_remembers_and_writes_nothing_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farnear.train(run_config(folder, "resumed", **keys_with(folder, 0.1, max_steps=3)))
    before = lines(folder / "resumed" / "quarantine.jsonl")
    farnear.train(run_config(folder, "resumed", **keys_with(folder, 0.1, max_steps=6)), "newest")
    assert lines(folder / "resumed" / "quarantine.jsonl") == before and len(before) == 2
    told = "continuing from step-00000003: 3 steps to go; it was to take 3 steps and takes 6 now, so the learning rate"
    assert f"{told} goes on at 5.00e-04" in capsys.readouterr().out


def test_a_batch_without_a_usable_pair_counts_none_and_moves_nothing(folder: Path) -> None:
    (shard,) = (folder / "data").glob("train-*.tar")
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in list(tar)[:16]]
    halved = [(name, data[: len(data) // 2] if name.endswith(".png") else data) for name, data in members]
    data = {"train": str(write_tar(folder / "useless.tar", halved)), "max_bad_fraction": 1.0}
    farnear.train(run_config(folder, "useless", data=data, training={"max_steps": 2, "weight_decay": 0.0}))
    steps = lines(folder / "useless" / "metrics.jsonl")
    assert [(step["pairs"], step["quarantined"], step["loss"], step["grad_norm"]) for step in steps] == [
        (0, 8, 0, 0)
    ] * 2
    summary = json.loads((folder / "useless" / "summary.json").read_text())
    assert summary["loss"] is None and summary["quarantined"] == 8


def test_excluded_pairs_are_no_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farnear.train(run_config(folder, "finds", **keys_with(folder, 0.1)))
    keys = keys_with(folder, 0.0)
    keys["data"]["exclude"] = str(folder / "finds" / "quarantine.jsonl")
    farnear.train(run_config(folder, "excludes", **keys))
    assert not (folder / "excludes" / "quarantine.jsonl").exists()
    assert "20 in 1 shard" in capsys.readouterr().out
    keys["data"]["exclude"] = str(folder / "run.yaml")
    with pytest.raises(UserError, match=r"data.exclude: .* cannot be read"):
        farnear.train(run_config(folder, "nothing", **keys))


@pytest.mark.parametrize("line", ['{"shard": "a.tar", "key": "\\ud800"}', "[" * 100_000, "{}", "1"])
def test_a_line_that_excludes_nothing_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "exclude.jsonl").write_text(f'\n{{"shard": "a.tar", "key": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=r"exclude.jsonl line 3 is no JSON object with") as error:
        list(read_exclusions([str(tmp_path / "exclude.jsonl")]))
    assert "\n" not in str(error.value)


def test_a_source_without_pairs_is_refused(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 6, 2)
    exclude = [(str(shards[1]), f"k{number:05d}") for number in (3, 4, 5)]
    index = index_of([shards[0]], [shards[1]], exclude=exclude)
    with pytest.raises(UserError, match=r"no training pair of source 's1' is left: data.exclude names 3 pairs"):
        check_index(index, "training", 0.01)
    with pytest.raises(UserError, match=r"no evaluation pair is left"):
        check_index(index_of([shards[1]], exclude=exclude), "evaluation", 0.01)


def test_an_exclusion_names_a_shard_by_its_path_or_by_a_name_that_no_other_has() -> None:
    shards = ["/data/a/part-0.tar", "/data/b/part-0.tar", "/data/b/part-1.tar", "https://h/c.tar?signature=1"]
    named = [("/data/b/part-0.tar", "k"), ("part-1.tar", "k"), ("https://h/c.tar", "k"), ("/elsewhere/part-1.tar", "k")]
    assert [shard for shard, _ in resolve_exclusions(named, shards)] == [*shards[1:], "/elsewhere/part-1.tar"]
    with pytest.raises(UserError, match=r"names 'k' of part-0.tar, but 2 shards are called so, /data/a/part-0.tar and"):
        resolve_exclusions([("part-0.tar", "k")], shards)


def test_pairs_of_the_evaluation_are_excluded_too(folder: Path, tmp_path: Path) -> None:
    (shard,) = (folder / "data").glob("eval-*.tar")
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    name = next(name for name, _ in members if name.endswith(".png"))
    broken = write_tar(
        tmp_path / shard.name, [(one, data[: len(data) // 2] if one == name else data) for one, data in members]
    )
    keys: dict[str, Any] = {"data": {"eval": str(broken)}, "training": {"max_steps": 1}}
    with pytest.raises(UserError, match=rf"the member '{name}' in shard .* or name the pair in a file of data.exclude"):
        farnear.train(run_config(folder, "eval-stops", **keys))
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text(json.dumps({"shard": str(broken), "key": name.partition(".")[0]}) + "\n")
    keys["data"]["exclude"] = str(exclude)
    farnear.train(run_config(folder, "eval-excludes", **keys))
    assert lines(folder / "eval-excludes" / "eval.jsonl")[-1]["queries"] == 7
    assert lines(folder / "eval-excludes" / "faults.jsonl") == []


def test_a_damaged_quarantine_is_named(tmp_path: Path) -> None:
    pairs = index_of(write_pairs(tmp_path, 4, 1))
    for line in ("{}", "[1]", '{"step": 1}', "\udcff"):
        (tmp_path / "q.jsonl").write_bytes(b"\n".join([line.encode("utf-8", "surrogateescape"), b"{}"]))
        with pytest.raises(UserError, match=r"q.jsonl line 1 names no pair"):
            Quarantine(tmp_path / "q.jsonl", pairs, 0.1, ALONE)


def test_two_pairs_that_are_called_alike_count_twice(folder: Path) -> None:
    """As farnear's own writers call them: the first shard and the first keys of every folder have the same names."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(folder / "broken" / "train-0.tar", folder / name / "train-0.tar")
    sources = {name: {"train": str(folder / name / "*.tar")} for name in ("one", "two")}
    config = run_config(folder, "alike", training={"max_steps": 11})  # two passes
    tree = config.model_dump(mode="json")
    tree["data"] = {**tree["data"], "train": [], "sources": sources, "max_bad_fraction": 0.2, "tail": "carry"}
    farnear.train(type(config).model_validate(tree))
    assert len({(one["shard"], one["key"]) for one in lines(folder / "alike" / "quarantine.jsonl")}) == 4
    assert json.loads((folder / "alike" / "summary.json").read_text())["quarantined"] == 4


def test_what_the_scan_loses_is_told_before_the_first_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = folder / "damaged"
    damaged.mkdir()
    (shard,) = (folder / "data").glob("train-*.tar")
    data = bytearray(shard.read_bytes())
    data[148 + 2 * 512 * 0] ^= 1  # the first header's checksum
    (damaged / "a.tar").write_bytes(data)
    keys: dict[str, Any] = {"data": {"train": str(damaged / "a.tar")}, "training": {"max_steps": 1}}
    with pytest.raises(
        UserError, match=r"faults? in 1 training shard costs? at least 2 of 22 pairs, .* above data.max"
    ):
        farnear.train(run_config(folder, "few", **keys))
    keys["data"]["max_bad_fraction"] = 0.1
    farnear.train(run_config(folder, "few", **keys))
    assert json.loads((folder / "few" / "summary.json").read_text())["lost_to_faults"] == 2
    out = capsys.readouterr().out
    assert "damaged_header" in out and "next_to_damage" in out and "2 lost to faults" in out
    faults = lines(folder / "few" / "faults.jsonl")
    assert [fault["kind"] for fault in faults] == ["damaged_header", "next_to_damage", "next_to_damage"]


def cut_short(shard: Path, members: int) -> None:
    """Leave the first ``members`` members, and half of the next one."""
    with tarfile.open(shard) as tar:
        cut = list(tar)[members]
    shard.write_bytes(shard.read_bytes()[: cut.offset_data + cut.size // 2])


def test_a_shard_that_was_cut_short_counts_for_what_the_others_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_pairs(tmp_path, 60, 3)
    cut_short(shards[1], 7)
    index = index_of(shards)
    # Of 20 pairs 3 are left, and of the fourth it is known that it was there.
    assert losses_of(index) == Losses(known=1, presumed=16, no_measure=())
    with pytest.raises(UserError, match=r"at least 1 of 44 pairs, and about 16 more if .* above data.max_bad_fraction"):
        tell_faults(index, "training", 0.28)
    tell_faults(index, "training", 0.29)  # 17 of 60 are 0.283
    assert "and about 16 more" in capsys.readouterr().out
    alone = index_of(shards[1:2])
    assert losses_of(alone) == Losses(known=1, presumed=0, no_measure=(str(shards[1]),))
    with pytest.raises(
        UserError, match=r"may have stood any number, which may be above .* \(0.99\); .* or set it to 1"
    ):
        tell_faults(alone, "training", 0.99)
    tell_faults(alone, "training", 1)
    # Pairs that were excluded are no loss, and no measure of what a shard held.
    exclude = [(str(shard), f"k{pair:05d}") for shard in shards for pair in range(60)]
    assert losses_of(index_of(shards, exclude=[one for one in exclude if one[0] != str(shards[1])])).presumed == 16
    assert losses_of(index_of(shards, exclude=[one for one in exclude if one[0] == str(shards[1])])).presumed == 16
    # Garbage to the end leaves as little as a cut.
    data = shards[2].read_bytes()
    with tarfile.open(shards[2]) as tar:
        place = list(tar)[10].offset
    shards[2].write_bytes(data[:place] + bytes(range(1, 256)) * ((len(data) - place) // 255))
    assert losses_of(index_of(shards[::2])).presumed == 20 - 5
    assert losses_of(index_of(shards[:1])) == Losses(0, 0, ())
    # Each source is its own measure.
    assert losses_of(index_of(shards[:1], shards[1:2])).no_measure == (str(shards[1]),)
    assert losses_of(index_of(shards[:2], shards[2:])).presumed == 16


def test_the_limit_counts_a_pair_once(tmp_path: Path) -> None:
    pairs = index_of(write_pairs(tmp_path, 100, 1))
    quarantine = Quarantine(tmp_path / "q.jsonl", pairs, 0.02, ALONE)
    one = Quarantined("a.tar", "k1", "a.tar/k1.png", "why")
    for step in range(5):
        quarantine.add(step, [one, Quarantined("a.tar", "k1", "a.tar/k1.neg0.png", "why"), one])
    assert len(lines(tmp_path / "q.jsonl")) == 2
    quarantine.add(5, [Quarantined("a.tar", "k2", "a.tar/k2.png", "why")])
    quarantine.stop_if_too_many(5)
    again = Quarantine(tmp_path / "q.jsonl", pairs, 0.02, ALONE)
    again.add(6, [Quarantined("a.tar", "k3", "a.tar/k3.png", "why")])
    with pytest.raises(RunStoppedError, match=r"step 6: 3 of 100 pairs .*\(0\.02\)"):
        again.stop_if_too_many(6)
