"""Nodes without a network: what `farnear prefetch` brings, and runs that have nothing else."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import fsspec
import pytest
import torch
import yaml
from object_stores import Fault, ModelHub, ObjectServer, hub_server, model_hub_server, object_server
from tiny_runs import make_inputs, run_tree

from farnear.cli import main
from farnear.config import load_config
from farnear.data.index import Index
from farnear.data.index_cache import cached_index
from farnear.data.prefetched import Known, add_known, read_known
from farnear.data.read import BadInputError, InputReader
from farnear.data.remote import RemoteFacts
from farnear.data.run_shards import shard_sets, shard_store
from farnear.errors import UserError
from farnear.model.hub import refuse_unless_fetched
from farnear.model.load import load_model
from farnear.parallel.world import World
from farnear.sections import ModelConfig
from farnear.training.shards import open_data

GLOB = "hf://datasets/org/pages/part-*.tar"


@dataclass
class Elsewhere:
    """A model on a hub, two training shards in a dataset on another one, an evaluation shard behind http."""

    folder: Path
    models: ModelHub
    datasets: Any
    objects: ObjectServer

    def run_file(self, **keys: Any) -> Path:
        """Of a run that has nothing on this machine."""
        data = {
            "train": GLOB,
            "eval": f"{self.objects.url}/eval.tar",
            "cache_dir": str(self.folder / "cache"),
            **keys.pop("data", {}),
        }
        tree = run_tree(self.folder, "run", **{"model": {"name_or_path": "org/tiny"}, **keys}, data=data)
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def requests(self) -> int:
        """That any of the servers has had."""
        return sum(len(server.requests) for server in (self.models, self.datasets, self.objects))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def elsewhere(inputs: Path, tmp_path: Path, network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    from huggingface_hub import constants

    [train] = (inputs / "data").glob("train-*.tar")
    [evaluated] = (inputs / "data").glob("eval-*.tar")
    with model_hub_server() as models, hub_server() as datasets, object_server() as objects:
        models.files = {path.name: path.read_bytes() for path in (inputs / "base").iterdir()}
        models.files |= {"pytorch_model.bin": b"the same once more", "onnx/model.onnx": b"and again"}
        datasets.files = {"part-0.tar": train.read_bytes(), "README.md": b"pages"}
        objects.put("eval.tar", evaluated.read_bytes())
        monkeypatch.setattr(constants, "ENDPOINT", models.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", models.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": datasets.url, "token": False})
        yield Elsewhere(tmp_path, models, datasets, objects)


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def training_index(run_file: Path) -> tuple[Index, bytes]:
    """As a run opens it, with the page of the first pair."""
    data = load_config(run_file).data
    cache = Path(data.cache_dir or "")
    store = shard_store(data, cache)
    indexes = [cached_index(of, cache, store) for of in shard_sets(data, store.expand) if of is not None]
    assert len(indexes) == 2
    index = indexes[0]
    return index, InputReader(index, store)[int(index.positives[0])].tobytes()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    text = capsys.readouterr().err
    assert text.startswith("farnear: error: ") and text.count("\n") == 1, text
    return text


def test_after_prefetch_a_run_asks_nobody(
    elsewhere: Elsewhere, go_offline: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    run_file = elsewhere.run_file()
    commit = elsewhere.models.commit
    assert main(["prefetch", str(run_file)]) == 0
    told = capsys.readouterr().out
    assert f"model org/tiny at {commit}: 7 files, " in told and "0 files, 0 bytes, were there already" in told
    assert "2 files left out: the same weights in other formats" in told
    assert f"its revision main may change; model.revision={commit} holds on to this one" in told
    assert "2 shards, " in told and "0 shards, 0 bytes, were there already" in told
    assert "training: 22 pairs in 1 shard" in told and "evaluation: 8 pairs" in told
    assert told.count(" in 1 shard, nothing wrong with them\n") == 2
    assert told.endswith(f"HF_HUB_OFFLINE=1 farnear launch {run_file}\n")
    assert elsewhere.models.downloaded() == set(elsewhere.models.files) - {"pytorch_model.bin", "onnx/model.onnx"}

    # Once more, and nothing is downloaded.
    shards, files = elsewhere.objects.gets("eval.tar"), elsewhere.models.downloaded()
    monkeypatch.setenv("HF_HOME", "/shared/h f")
    assert main(["prefetch", str(run_file), f"model.revision={commit}"]) == 0
    told = capsys.readouterr().out
    assert "HF_HUB_OFFLINE=1 HF_HOME='/shared/h f' farnear launch" in told
    assert "0 files, 0 bytes, downloaded" in told and "may change" not in told and "0 shards, 0 bytes, downl" in told
    assert (elsewhere.objects.gets("eval.tar"), elsewhere.models.downloaded()) == (shards, files)

    online = training_index(run_file)
    asked = elsewhere.requests()
    go_offline()
    # Another state of the shards is there now, which nobody is to notice.
    elsewhere.datasets.files["part-1.tar"] = elsewhere.datasets.files["part-0.tar"]
    index, page = training_index(run_file)
    assert (index.fingerprint, page) == (online[0].fingerprint, online[1])
    assert len(load_model(load_config(run_file).model)) == 3
    assert len(load_model(ModelConfig(name_or_path="org/tiny", revision=commit))) == 3
    assert elsewhere.requests() == asked


def test_what_failed_goes_on(elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = elsewhere.run_file()
    elsewhere.objects.faults["eval.tar"] = [Fault(status=403)]
    elsewhere.models.refused = {"config.json"}
    assert main(["prefetch", str(run_file)]) == 2
    assert "model org/tiny cannot be fetched (" in error_of(capsys)
    elsewhere.models.refused = set()
    brought = elsewhere.models.downloaded()
    elsewhere.models.requests.clear()
    assert main(["prefetch", str(run_file)]) == 2
    assert "eval.tar cannot be read (403 Forbidden)" in error_of(capsys)
    assert elsewhere.models.downloaded() <= {"config.json"} | (set(elsewhere.models.files) - brought)
    # What runs are told is all there, or nothing is told.
    assert read_known(elsewhere.folder / "cache") == Known()
    assert main(["prefetch", str(run_file)]) == 0
    assert len(list((elsewhere.folder / "cache" / "shards").glob("*.tar-*"))) == 2
    assert len(read_known(elsewhere.folder / "cache").facts) == 2


def test_what_was_not_prefetched_is_named(
    elsewhere: Elsewhere, go_offline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = elsewhere.run_file()
    go_offline()
    asked = elsewhere.requests()
    wanted = (
        r"HF_HUB_OFFLINE is set, so nothing is downloaded; run `farnear prefetch RUN.yaml` where there is a network"
    )
    with pytest.raises(UserError, match=r"which files match hf://.*part-\*.tar is not known.*" + wanted):
        training_index(run_file)
    with pytest.raises(UserError, match=r"shard http://.*/eval.tar was not prefetched.*" + wanted):
        training_index(elsewhere.run_file(data={"train": f"{elsewhere.objects.url}/eval.tar", "eval": []}))
    with pytest.raises(
        UserError, match=r"model org/tiny cannot be loaded: no folder of that name.* is not in the hub's "
    ):
        load_model(ModelConfig(name_or_path="org/tiny"))
    with pytest.raises(UserError, match=r"data.remote: ranges reads every pair over the network, which HF_HUB_OFFLINE"):
        training_index(elsewhere.run_file(data={"remote": "ranges"}))
    assert main(["prefetch", str(elsewhere.run_file())]) == 2
    assert "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it" in error_of(capsys)
    assert elsewhere.requests() == asked


def test_a_hub_that_does_not_answer_is_asked_once(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for file after file, each with retries; and one that says no is believed only when the file is asked for."""
    from huggingface_hub import constants

    asked = elsewhere.requests()
    model = ModelConfig(name_or_path="org/tiny")
    refuse_unless_fetched(model)
    assert elsewhere.requests() > asked
    refuse_unless_fetched(ModelConfig(name_or_path="org/other"))  # 404
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = monotonic()
    with pytest.raises(
        UserError, match=r"org/tiny cannot be loaded: .*The hub cannot be asked \(ConnectError: .*prefetch"
    ):
        load_model(model)
    assert monotonic() - started < 10


def test_what_is_lost_after_prefetch_is_named(
    elsewhere: Elsewhere, go_offline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = elsewhere.run_file()
    assert main(["prefetch", str(run_file)]) == 0
    cache, hub = elsewhere.folder / "cache", elsewhere.folder / "hub"
    go_offline()
    asked = elsewhere.requests()
    [part] = (cache / "shards").glob("part-0.tar-*")
    whole = part.read_bytes()
    config = load_config(run_file)
    # A run does not find out only where it reads a pair.
    for read in (
        lambda: open_data(config.data, config.evaluation, World(0, 1, torch.device("cpu"))),
        lambda: training_index(run_file),
    ):
        part.write_bytes(whole[:-512])
        for _ in ("cut off", "gone"):
            with pytest.raises(UserError, match=r"part-0.tar is not in the shard cache .*, or was cut off there. HF_H"):
                read()
            part.unlink(missing_ok=True)
    # The index goes with it: it cannot be made again without its shards.
    shutil.rmtree(cache / "indexes")
    shutil.rmtree(cache / "scans")
    with pytest.raises(UserError, match=r"part-0.tar is not in the shard cache"):
        training_index(run_file)
    for damaged in ("{", '{"format": "farnear prefetched 0"}', '{"format": "farnear prefetched 1", "shards": []}'):
        (cache / "prefetched.json").write_text(damaged)
        with pytest.raises(
            UserError, match=r"prefetched.json cannot be read .*so what was prefetched is not known; run"
        ):
            training_index(run_file)
    # A download of another program that lacks what tells a model with modules from a raw one; then one without weights.
    [snapshot] = (hub / "models--org--tiny" / "snapshots").iterdir()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"org/tiny cannot be loaded \(.*HF_HUB_OFFLINE is set, so nothing is downloaded"
    ):
        load_model(ModelConfig(name_or_path="org/tiny"))
    shutil.rmtree(hub / "models--org--tiny" / ".no_exist")
    with pytest.raises(UserError, match=r"org/tiny cannot be loaded: .* it is not in the hub's cache"):
        load_model(ModelConfig(name_or_path="org/tiny"))
    assert elsewhere.requests() == asked


def test_a_damaged_copy_is_kept_where_no_other_can_be_had(elsewhere: Elsewhere, go_offline: Any) -> None:
    """Its broken pages are left out one by one, where a download would have been tried."""
    run_file = elsewhere.run_file()
    assert main(["prefetch", str(run_file)]) == 0
    go_offline()
    index, _ = training_index(run_file)
    [part] = (elsewhere.folder / "cache" / "shards").glob("part-0.tar-*")
    data = bytearray(part.read_bytes())
    member = int(index.part_start_I1[index.positives[0]])
    data[int(index.part_offset_M[member]) + 40] ^= 255
    part.write_bytes(data)
    store = shard_store(load_config(run_file).data, elsewhere.folder / "cache")
    reader = InputReader(index, store)
    with pytest.raises(BadInputError, match=r"has other bytes than when it was indexed"):
        reader[int(index.positives[0])]
    assert reader[int(index.positives[1])].width
    assert part.exists()


def test_shards_that_would_drive_each_other_out_are_not_begun(
    elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = elsewhere.run_file(data={"remote_cache_gb": 0.0001})
    assert main(["prefetch", str(run_file)]) == 2
    error = error_of(capsys)
    assert "the run's 2 remote shards take 1" in error and "data.remote_cache_gb allows 100.0 kB" in error
    assert "set it to 0.1 or more" in error
    assert not elsewhere.models.requests and not elsewhere.objects.gets("eval.tar")
    assert main(["prefetch", str(elsewhere.run_file(data={"remote": "ranges"}))]) == 2
    assert "there is nothing to fetch ahead; set data.remote: cache" in error_of(capsys)


def test_other_shards_make_room_and_the_runs_own_do_not(
    elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(map(len, (elsewhere.datasets.files["part-0.tar"], elsewhere.objects.objects["eval.tar"])))
    run_file = elsewhere.run_file(data={"remote_cache_gb": size / 1e9})
    assert main(["prefetch", str(run_file)]) == 0
    shards = elsewhere.folder / "cache" / "shards"
    [evaluated] = shards.glob("eval.tar-*")
    evaluated.unlink()
    # Of another run: newer than part-0.tar, which is the run's own.
    foreign = shards / f"foreign-{'0' * 32}"
    foreign.write_bytes(bytes(1000))
    capsys.readouterr()
    assert main(["prefetch", str(run_file)]) == 0
    assert "1 shard, " in capsys.readouterr().out
    assert not foreign.exists() and len(elsewhere.objects.gets("eval.tar")) == 2
    assert len(list(shards.glob("*.tar-*"))) == 2


def test_a_run_of_files_needs_nothing(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    tree = run_tree(inputs, "run", data={"cache_dir": str(tmp_path / "cache")})
    run_file.write_text(yaml.safe_dump(tree))
    assert main(["prefetch", str(run_file)]) == 0
    told = capsys.readouterr().out
    assert f"model {inputs / 'base'}: a folder, nothing to fetch\nshards: files, nothing to fetch\n" in told
    assert "training: 22 pairs" in told
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["indexes", "scans"]
    assert main(["prefetch", str(run_file), "data.train=[none-*.tar]"]) == 2
    assert "matches no file" in error_of(capsys)
    assert main(["prefetch", str(run_file), "model.name_or_path=./none"]) == 2
    assert "there is no model folder" in error_of(capsys)


def test_what_is_known_is_added_to(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = Known({"s3://a/*": ["s3://a/b"]}, {"s3://a/b": RemoteFacts(1, '"x"')})
    add_known(cache, first)
    add_known(cache, Known({"s3://c/*": []}, {"s3://a/b": RemoteFacts(2, '"y"')}))
    assert read_known(cache) == Known({**first.listings, "s3://c/*": []}, {"s3://a/b": RemoteFacts(2, '"y"')})
    (cache / "prefetched.json").write_text("{")
    add_known(cache, first)
    assert read_known(cache) == first
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.soak
def test_a_launch_without_any_network(inputs: Path, tmp_path: Path) -> None:
    """`farnear launch` in a network namespace that has no interface but lo."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("NOT TESTED: network namespaces are not permitted here; run as root with util-linux and iproute2")
    with model_hub_server() as models, object_server() as objects:
        models.files = {path.name: path.read_bytes() for path in (inputs / "base").iterdir()}
        data = {
            name: [objects.put(path.name, path.read_bytes()) for path in (inputs / "data").glob(f"{name}-*.tar")]
            for name in ("train", "eval")
        }
        tree = run_tree(
            *(tmp_path, "run"),
            strategy="ddp",
            model={"name_or_path": "org/tiny"},
            training={"max_steps": 2},
            data={**data, "cache_dir": str(tmp_path / "cache")},
        )
        run_file = tmp_path / "run.yaml"
        run_file.write_text(yaml.safe_dump(tree))
        environment = {**os.environ, "HF_ENDPOINT": models.url, "HF_HOME": str(tmp_path / "hf")}
        farnear = [sys.executable, "-m", "farnear"]
        fetched = [*farnear, "prefetch", str(run_file)]
        subprocess.run(fetched, env={**environment, "HF_HUB_OFFLINE": "0"}, check=True, timeout=60)
    launched = [*farnear, "launch", str(run_file), "--num_processes", "2"]
    subprocess.run([*alone, *launched], env={**environment, "HF_HUB_OFFLINE": "1"}, check=True, timeout=240)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 2)
