"""A published checkpoint is whole, or refused by name; what a killed save leaves is removed and said."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from farnear.errors import UserError
from farnear.parallel.replicated import Replicated
from farnear.parallel.world import World
from farnear.training.checkpoint import (
    Progress,
    find_checkpoint,
    load_state,
    open_checkpoint,
    retain,
    save_checkpoint,
)
from farnear.training.scale import TrainedState

ALONE = World(0, 1, torch.device("cpu"))


def trained_module(seed: int) -> tuple[nn.Module, Replicated]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    strategy = Replicated(module, torch.optim.AdamW(module.parameters(), lr=0.1), 1.0, ALONE)
    for _ in range(2):
        with strategy.accumulate():
            strategy.backward(strategy.embed(torch.randn(5, 3)).square().sum())
        strategy.step(0.1)
    return module, strategy


def state_of(strategy: Replicated, module: nn.Module) -> TrainedState:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return TrainedState(strategy, shapes, None, is_main=True)


def save_step(folder: Path, step: int, seed: int = 0, **about: bool) -> Path:
    module, strategy = trained_module(seed)
    return save_checkpoint(folder / "checkpoints", state_of(strategy, module), Progress(step, 1, 2, "f"), ALONE, about)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return save_step(tmp_path, 3)


def load_all(folder: Path) -> tuple[nn.Module, Replicated]:
    checkpoint = open_checkpoint(folder)
    module, strategy = trained_module(seed=9)
    load_state(checkpoint, state_of(strategy, module))
    return module, strategy


def test_what_is_saved_is_loaded(published: Path) -> None:
    module, strategy = load_all(published)
    expected, saved_by = trained_module(seed=0)
    for ours, wanted in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(strategy.slices(owned=False), saved_by.slices(owned=False), strict=True):
        assert torch.equal(ours.exp_avg_n, wanted.exp_avg_n)
        assert torch.equal(ours.exp_avg_sq_n, wanted.exp_avg_sq_n)
        assert int(ours.step) == 2
    assert (published.parent.parent / "latest").read_text() == "step-00000003\n"


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    with pytest.raises(UserError, match="exists already and is never overwritten"):
        save_step(tmp_path, 3)


def test_a_truncated_file_is_refused(published: Path) -> None:
    path = published / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rank-00000\.safetensors has \d+ bytes, not the"):
        open_checkpoint(published)


def test_a_flipped_bit_is_refused(published: Path) -> None:
    path = published / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="its hash differs"):
        open_checkpoint(published)


def test_a_missing_file_is_refused(published: Path) -> None:
    (published / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks rank-00000\.safetensors"):
        open_checkpoint(published)


def test_a_file_of_another_save_is_refused(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1, seed=0), save_step(tmp_path, 2, seed=1)
    shutil.copy(first / "rank-00000.safetensors", second)
    with pytest.raises(UserError, match="hash differs"):
        open_checkpoint(second)
    # Even a manifest made to fit does not make one checkpoint out of two saves.
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (first, second)]
    manifests[1]["files"] = manifests[0]["files"]
    (second / "manifest.json").write_text(json.dumps(manifests[1]))
    with pytest.raises(UserError, match="is of another save than its manifest"):
        load_all(second)


def test_missing_elements_are_refused(published: Path) -> None:
    manifest = json.loads((published / "manifest.json").read_text())
    path = published / "rank-00000.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("exp_avg/"))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path, metadata={"save_id": manifest["save_id"]})
    facts = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest["files"][path.name] = facts
    (published / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not whole: exp_avg of"):
        load_all(published)


def test_a_checkpoint_without_manifest_is_refused(published: Path) -> None:
    (published / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        find_checkpoint(published.parent)


def test_another_model_is_refused(published: Path) -> None:
    _, strategy = trained_module(seed=0)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(UserError, match=r"another model: parameter 0\.bias differs"):
        load_state(open_checkpoint(published), state_of(strategy, other))


def test_leftovers_of_a_killed_save_are_removed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = tmp_path / "checkpoints" / ".saving-abc"
    leftover.mkdir(parents=True)
    assert find_checkpoint(tmp_path / "checkpoints") is None
    save_step(tmp_path, 1)
    assert not leftover.exists()
    assert ".saving-abc" in capsys.readouterr().out


def test_retention_spares_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    folder = tmp_path / "checkpoints"
    retain(folder, 2, best_step=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000004"]
    retain(folder, 1, best_step=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000004"]
    retain(folder, None, best_step=None)
    assert len(list(folder.iterdir())) == 2


def test_a_former_best_goes_when_it_was_saved_for_that_alone(tmp_path: Path) -> None:
    for step, as_best in ((1, True), (2, False), (3, True), (4, True)):
        save_step(tmp_path, step, saved_as_best=as_best)
    retain(tmp_path / "checkpoints", None, best_step=3)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_checkpoint_set_aside_by_hand_does_not_count(tmp_path: Path) -> None:
    newest = save_step(tmp_path, 2)
    shutil.copytree(save_step(tmp_path, 1), newest.with_name("step-00000003.old"))
    (newest.with_name("step-broken")).mkdir()
    found = find_checkpoint(newest.parent)
    assert found is not None
    assert found.folder == newest


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_step(tmp_path, 1)

    def save_file(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("farnear.training.checkpoint.save_file", save_file)
    with pytest.raises(UserError, match=r"step 2 was not saved: rank 0 cannot write .* No space left on device"):
        save_step(tmp_path, 2)
    assert list(first.parent.iterdir()) == [first]
    assert load_all(first)
