"""Whole trainings on what the data plane offers: URLs, sources, pages by reference, several kinds of documents."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from object_stores import Fault, object_server
from ranks import run_ranks
from tar_makers import Members, write_tar
from tiny_runs import make_inputs, run_config

import farnear
from farnear.errors import UserError
from farnear.parallel.world import start_world, stop_world
from farnear.training.run import train_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key to suffix to bytes of the training pairs."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted((folder / "data").glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in lines(run / "metrics.jsonl")]


def halves(samples: dict[str, dict[str, bytes]], folder: Path) -> list[Path]:
    """The pairs in two shards."""
    keys = sorted(samples)
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    folder.mkdir()
    return [
        write_tar(
            folder / f"part-{number}.tar",
            [(f"{key}.{suffix}", data) for key in part for suffix, data in samples[key].items()],
        )
        for number, part in enumerate(parts)
    ]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("remote", ["cache", "ranges"])
def test_shards_behind_urls_train_as_files_do(
    folder: Path, samples: dict[str, dict[str, bytes]], tmp_path: Path, remote: str
) -> None:
    shards = halves(samples, tmp_path / "shards")
    farnear.train(run_config(folder, f"files-{remote}", data={"train": list(map(str, shards))}))
    with object_server() as server:
        urls = [server.put(f"pairs/{shard.name}", shard.read_bytes()) for shard in shards]
        server.faults["pairs/part-0.tar"] += [Fault(status=503), Fault(cut_at=700)]
        data = {"train": urls, "cache_dir": str(tmp_path / "cache"), "remote": remote, "dataloader_num_workers": 2}
        config = run_config(folder, f"urls-{remote}", data=data)
        farnear.train(config)
        assert losses(folder / f"urls-{remote}") == losses(folder / f"files-{remote}")
        if remote == "cache":
            assert len(server.gets("pairs/part-1.tar")) == 1  # indexed and read from one download
        downloads = len(server.requests)
        shutil.rmtree(folder / f"urls-{remote}" / "checkpoints" / "step-00000006")
        farnear.train(config, "newest")
        assert losses(folder / f"urls-{remote}") == losses(folder / f"files-{remote}")
        if remote == "cache":
            assert [request[0] for request in server.requests[downloads:]] == ["HEAD"] * 2
        server.put("pairs/part-1.tar", shards[0].read_bytes())
        with pytest.raises(UserError, match="key 'train-000000' is used in shard"):
            farnear.train(run_config(folder, f"changed-{remote}", data=data))


def by_reference(samples: dict[str, dict[str, bytes]], folder: Path) -> tuple[Path, Path]:
    """The same pairs with their pages in a corpus shard, in the order of the pairs."""
    pages = [(f"page-{key}.png", sample["png"]) for key, sample in samples.items()]
    records: Members = [
        (f"{key}.json", json.dumps({**json.loads(sample["json"]), "pos_id": f"page-{key}"}).encode())
        for key, sample in samples.items()
    ]
    return write_tar(folder / "pairs.tar", records), write_tar(folder / "corpus.tar", pages)


def test_pages_by_reference_evaluate_and_train(
    folder: Path, samples: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    pairs, corpus = by_reference(samples, tmp_path)
    inline = sorted((folder / "data").glob("train-*.tar"))[0]
    evaluated: dict[str, Any] = {}
    for name, keys in {
        "inline": {"train": str(folder / "data" / "eval-*.tar"), "eval": str(inline)},
        "referenced": {
            "train": str(folder / "data" / "eval-*.tar"),
            "eval": str(pairs),
            "eval_corpus": str(corpus),
        },
    }.items():
        farnear.train(run_config(folder, f"eval-{name}", data=keys, training={"max_steps": 1, "learning_rate": 1e-9}))
        evaluated[name] = lines(folder / f"eval-{name}" / "eval.jsonl")[0]
        del evaluated[name]["seconds"]
    assert evaluated["inline"] == evaluated["referenced"]
    keys = {"train": str(pairs), "train_corpus": str(corpus)}
    farnear.train(run_config(folder, "referenced", data=keys, training={"max_steps": 2}))
    assert [step["pairs"] for step in lines(folder / "referenced" / "metrics.jsonl")] == [8, 8]
    with pytest.raises(UserError, match=r"holds nothing that can be used: .* has no query"):
        farnear.train(run_config(folder, "wrong-way", data={"train": str(corpus)}))
    with pytest.raises(UserError, match=r"cost at least 22 of 22 pairs|costs at least 22 of 22 pairs"):
        farnear.train(run_config(folder, "no-corpus", data={"train": str(pairs)}))


def test_several_sources_are_mixed_by_weight(
    folder: Path, samples: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = halves(samples, tmp_path / "shards")
    sources = {"a": {"train": str(first), "weight": 3}, "b": {"train": str(second), "weight": 1}}
    base = run_config(folder, "unused").model_dump(mode="json")["data"]
    for mixing in ("within_batch", "per_batch"):
        data = {**base, "train": [], "sources": sources, "mixing": mixing, "tail": "carry"}
        config = run_config(folder, f"sources-{mixing}")
        config = type(config).model_validate({**config.model_dump(mode="json"), "data": data})
        farnear.train(config)
        out = capsys.readouterr().out
        assert re.search(rf"passes an epoch: a (0\.\d+|1\.00), b 0\.\d+ \(mixed {mixing}\)", out), out
        assert len(losses(folder / f"sources-{mixing}")) == int(2 * 11 / (8 * 0.75))
    changed = config.model_copy(update={"data": config.data.model_copy(update={"mixing": "within_batch"})})
    (folder / "sources-per_batch" / "summary.json").unlink()
    shutil.rmtree(folder / "sources-per_batch" / "checkpoints" / "step-00000003")
    with pytest.raises(UserError, match=r"made with another value of data\.mixing"):
        farnear.train(changed, "newest")


def train_with_texts(rank: int, world_size: int, folder: Path, shard: Path) -> None:
    world = start_world(run_config(folder, "unused", strategy="zero3"))
    for strategy in ("zero3", "ddp"):
        config = run_config(
            folder, f"texts-{strategy}", strategy=strategy, data={"train": str(shard)}, training={"max_steps": 3}
        )
        train_in(world, config)
    stop_world()


def test_texts_beside_pages_do_not_hang_ranks_that_have_none(
    folder: Path, samples: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Under ZeRO-3 a rank without a text document still has to take part in the forward of another's."""
    members: Members = []
    for number, (key, sample) in enumerate(samples.items()):
        page = (f"{key}.txt", f"a page about {number}".encode()) if number % 8 == 0 else (f"{key}.png", sample["png"])
        members += [(f"{key}.json", sample["json"]), page]
    shard = write_tar(tmp_path / "mixed.tar", members)
    run_ranks(train_with_texts, 3, folder, shard, seconds=200)
    assert losses(folder / "texts-zero3") == pytest.approx(losses(folder / "texts-ddp"), rel=1e-4)
