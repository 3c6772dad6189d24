"""A published checkpoint is whole, or refused by name; what a killed save leaves is removed and said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import change_manifest, load_checkpoint, save_checkpoint, saver_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import run_config
from torch import nn

from farnear.errors import RunStoppedError, UserError
from farnear.parallel.replicated import Replicated
from farnear.parallel.strategy import ParameterSlice
from farnear.parallel.world import World, start_world, stop_world
from farnear.training import restoring, saving
from farnear.training.checkpoint import (
    Progress,
    checkpoint_to_resume,
    hash_of,
    open_checkpoint,
    seal_of,
    whole_checkpoint,
)
from farnear.training.retention import Retention, retain
from farnear.training.scale import TrainedState

ALONE = World(0, 1, torch.device("cpu"))
FILE = "rank-00000.0.safetensors"


def trained_module(seed: int) -> tuple[nn.Module, Replicated]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    strategy = Replicated(module, torch.optim.AdamW(module.parameters(), lr=0.1), 1.0, ALONE)
    for _ in range(2):
        with strategy.accumulate():
            strategy.backward(strategy.forward(torch.randn(5, 3)).square().sum())
        strategy.step(0.1)
    return module, strategy


def state_of(strategy: Replicated, module: nn.Module) -> TrainedState:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return TrainedState(strategy, shapes, None, is_main=True)


def save_step(folder: Path, step: int, seed: int = 0, **keys: Any) -> Path:
    module, strategy = trained_module(seed)
    return save_checkpoint(folder / "checkpoints", state_of(strategy, module), step, ALONE, **keys)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return save_step(tmp_path, 3)


def load_all(folder: Path) -> tuple[nn.Module, Replicated]:
    module, strategy = trained_module(seed=9)
    load_checkpoint(folder, state_of(strategy, module), ALONE)
    return module, strategy


def newest_whole(checkpoints: Path) -> Path | None:
    found, _ = checkpoint_to_resume(checkpoints, "auto", ALONE, verify=True)
    return found.folder if found else None


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
    assert {path.name for path in published.iterdir()} == {FILE, "manifest.json", "manifest.xxh128"}


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    with pytest.raises(UserError, match="exists already and is never overwritten"):
        save_step(tmp_path, 3)


# Refused, by name


def truncate(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def delete(file: Path, _: Path) -> None:
    file.unlink()


def flip(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def write_two(rank: int, world_size: int, folder: Path) -> None:
    """Checkpoints of steps 1 and 2 by two ranks, in two files each."""
    world = start_world(run_config(folder, "unused", strategy="ddp"))
    saving.FILE_BYTES = 120
    for step in (1, 2):
        module, _ = trained_module(seed=step)
        strategy = Replicated(module, torch.optim.AdamW(module.parameters()), 1.0, world)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        state = TrainedState(strategy, shapes, None, is_main=world.is_main)
        save_checkpoint(folder / "checkpoints", state, step, world)
    stop_world()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(write_two, 2, folder)
    return folder


@pytest.mark.parametrize("damage", [truncate, swap, delete, flip, empty])
def test_every_file_that_is_damaged_is_refused_by_name(
    two_steps: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    """Each file of the newer of two checkpoints, the manifest too; `auto` then takes the older one, and says why."""
    names = sorted(path.name for path in (two_steps / "checkpoints" / "step-00000002").iterdir())
    assert len(names) == 6
    for name in names:
        run = tmp_path / name
        shutil.copytree(two_steps, run)
        older, newer = run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"
        damage(newer / name, older / name)
        with pytest.raises(UserError, match=f"{newer}.*{name}") as caught:
            checkpoint_to_resume(run / "checkpoints", "newest", ALONE, verify=True)
        assert "\n" not in str(caught.value)
        assert "say --resume auto to continue from the newest whole checkpoint" in str(caught.value)
        found, damaged = checkpoint_to_resume(run / "checkpoints", "auto", ALONE, verify=True)
        assert found is not None
        assert found.folder == older
        assert list(damaged) == [newer]
        flip(older / name, newer / name)
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole"):
            checkpoint_to_resume(run / "checkpoints", "auto", ALONE, verify=True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_bit_of_a_checkpoint_may_change(two_steps: Path, data: st.DataObject) -> None:
    folder = two_steps / "checkpoints" / "step-00000002"
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    try:
        with pytest.raises(UserError, match=f"{path.name}"):
            whole_checkpoint(folder, ALONE, verify=True)
    finally:
        path.write_bytes(content)
    whole_checkpoint(folder, ALONE, verify=True)


def test_hashes_are_looked_at_unless_the_run_file_says_no(published: Path) -> None:
    flip(published / FILE, published)
    whole_checkpoint(published, ALONE, verify=False)
    with pytest.raises(UserError, match="its hash differs"):
        whole_checkpoint(published, ALONE, verify=True)
    truncate(published / FILE, published)
    with pytest.raises(UserError, match=rf"{FILE} has \d+ bytes, not the \d+ that were saved"):
        whole_checkpoint(published, ALONE, verify=False)


def test_a_file_of_another_save_is_refused_where_its_manifest_was_made_to_fit(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1, seed=0), save_step(tmp_path, 2, seed=1)
    shutil.copy(first / FILE, second)
    files = json.loads((first / "manifest.json").read_text())["files"]
    change_manifest(second, lambda manifest: manifest.update(files=files))
    with pytest.raises(UserError, match="is of another save than its manifest"):
        load_all(second)


def made_to_fit(folder: Path) -> None:
    """Give the manifest size and hash of what lies there."""
    path = folder / FILE
    facts = {"bytes": path.stat().st_size, "xxh3_128": hash_of(path)}
    change_manifest(folder, lambda manifest: manifest["files"][FILE].update(facts))


def test_a_piece_that_is_not_what_the_manifest_says_is_refused(published: Path) -> None:
    path = published / FILE
    save_id = json.loads((published / "manifest.json").read_text())["save_id"]
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("exp_avg/"))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path, metadata={"save_id": save_id})
    made_to_fit(published)
    with pytest.raises(UserError, match="holds another piece of"):
        load_all(published)
    del tensors[key]
    save_file(tensors, path, metadata={"save_id": save_id})
    made_to_fit(published)
    with pytest.raises(UserError, match=f"{FILE} cannot be read"):
        load_all(published)


@pytest.mark.parametrize("span", [(0, 5), (1, 6), (0, 7), (2, 2)])
def test_elements_that_no_file_holds_or_two_are_refused(published: Path, span: tuple[int, int]) -> None:
    change_manifest(published, lambda manifest: manifest["files"][FILE]["pieces"].update({"1.weight": span}))
    with pytest.raises(UserError, match=r"step-00000003 is not whole: 1\.weight is covered up to"):
        open_checkpoint(published)


def test_elements_that_two_files_hold_are_refused(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"

    def twice(manifest: dict[str, Any]) -> None:
        [file] = [one for name, one in manifest["files"].items() if "rank-00001" in name and "0.bias" in one["pieces"]]
        assert file["pieces"]["0.bias"] == [1, 4]
        file["pieces"]["0.bias"] = [0, 4]

    open_checkpoint(folder)
    change_manifest(folder, twice)
    with pytest.raises(UserError, match=r"0\.bias is covered up to 1 of 4"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../rank-00000.0.safetensors", "/etc/passwd", "a/rank-00000.0.safetensors", "x.bin"])
def test_a_manifest_does_not_lead_out_of_its_folder(published: Path, name: str) -> None:
    def lead_out(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: manifest["files"][FILE]}

    change_manifest(published, lead_out)
    with pytest.raises(UserError, match=r"its manifest\.json is damaged \(files"):
        open_checkpoint(published)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no readable manifest"),
        ("[1]", "no JSON object"),
        ('{"format": 1}', "has format 1, this farnear reads 2"),
        ('{"format": 2}', r"is damaged \(save_id"),
    ],
)
def test_a_manifest_that_is_none_is_refused(published: Path, text: str, words: str) -> None:
    (published / "manifest.json").write_text(text)
    (published / "manifest.xxh128").write_text(seal_of(text.encode()))
    with pytest.raises(UserError, match=words):
        open_checkpoint(published)


@pytest.mark.parametrize(("start", "stop", "files"), [(0, 5, 1), (10, 14, 3), (3, 25, 4)])
def test_a_rank_reads_its_own_slices_and_no_others(
    two_steps: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int, files: int
) -> None:
    """Of all parameters laid end to end, those from start to stop, whoever saved them."""
    folder = two_steps / "checkpoints" / "step-00000002"
    module, _ = trained_module(seed=2)
    whole = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    checkpoint = open_checkpoint(folder)
    pieces, before = [], 0
    for name, parameter in module.named_parameters():
        first, last = max(start - before, 0), min(stop - before, parameter.numel())
        if first < last:
            pieces.append(ParameterSlice(name, first, *torch.zeros(3, last - first), step=torch.zeros(())))
        before += parameter.numel()
    opened, read = [], []

    def counted(path: Path, **keys: Any) -> Any:
        opened.append(path.name)
        return CountingFile(safe_open(path, **keys), read)

    monkeypatch.setattr(restoring, "safe_open", counted)
    state = SimpleNamespace(
        shapes={name: facts.shape for name, facts in checkpoint.manifest.parameters.items()},
        frozen_hash="",
        slices=lambda owned: pieces,
        spread_weights=lambda: None,
    )
    restoring.load_state(checkpoint, state, ALONE)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([piece.weight_n for piece in pieces]), whole[start:stop])
    assert len(opened) == len(set(opened)) == files
    assert sum(read) == 3 * (stop - start)


class CountingFile:
    """A safetensors file that notes how many elements are read from it."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self._file, self._read = file, read

    def __enter__(self) -> "CountingFile":
        self._opened = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def metadata(self) -> Any:
        return self._opened.metadata()

    def get_slice(self, key: str) -> Any:
        piece, read = self._opened.get_slice(key), self._read

        class Counting:
            get_shape = staticmethod(piece.get_shape)

            def __getitem__(self, place: slice) -> torch.Tensor:
                found: torch.Tensor = piece[place]
                read.append(found.numel())
                return found

        return Counting()


def test_a_copy_under_another_name_is_refused(published: Path) -> None:
    copy = published.with_name("step-00000009")
    shutil.copytree(published, copy)
    with pytest.raises(UserError, match="step-00000009 is a copy under another name, of step-00000003"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "changed",
    [
        {"progress": {"step": -3}},
        {"progress": {"numbers": {"losses": 5}}},
        {"parameters": {"0.bias": {"step": 10**30}}},
    ],
)
def test_a_manifest_with_values_that_cannot_be_is_refused(published: Path, changed: dict[str, Any]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        [(section, values)] = changed.items()
        for name, value in values.items():
            manifest[section][name] = {**manifest[section][name], **value} if section == "parameters" else value

    change_manifest(published, change)
    with pytest.raises(UserError, match=rf"manifest\.json is damaged \({next(iter(changed))}"):
        open_checkpoint(published)


def test_another_model_is_refused(published: Path) -> None:
    _, strategy = trained_module(seed=0)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(UserError, match=r"another model: parameter 0\.bias differs"):
        load_checkpoint(published, state_of(strategy, other), ALONE)


def test_nothing_is_unpickled() -> None:
    """No module of farnear reads pickles from a disk: the one that is used goes from a rank to its own workers."""
    sources = Path(saving.__file__).parents[1].rglob("*.py")
    words = ("torch.load(", "pickle.load(", "allow_pickle=True", "weights_only=False", "joblib", "import dill")
    found = {path.name: word for path in sources for word in words if word in path.read_text()}
    assert found == {}


# Saving


def test_leftovers_of_a_killed_save_are_removed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = tmp_path / "checkpoints" / ".saving-abc"
    leftover.mkdir(parents=True)
    assert newest_whole(tmp_path / "checkpoints") is None
    save_step(tmp_path, 1)
    assert not leftover.exists()
    assert ".saving-abc" in capsys.readouterr().out


def test_a_checkpoint_that_was_moved_behind_a_link_stays_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_step(tmp_path, 1)
    moved = first.rename(tmp_path / "moved")
    first.symlink_to(moved)
    (tmp_path / "checkpoints" / ".saving-a-file").touch()
    keeps_one = saver_of(tmp_path / "checkpoints", ALONE, Retention(1))
    module, strategy = trained_module(seed=0)
    keeps_one.save(state_of(strategy, module), Progress(2, 1, 2, "f"), periodic=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(list(moved.iterdir())) == 3

    def refused(path: Path, **_: Any) -> None:
        if path.name.startswith(".saving"):
            return
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refused)
    keeps_one.save(state_of(strategy, module), Progress(3, 1, 2, "f"), periodic=True)
    assert "cannot be removed ([Errno 13] Permission denied" in capsys.readouterr().out
    assert newest_whole(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000003"


def test_retention_spares_the_newest_the_best_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_step(tmp_path, step)
    folder = tmp_path / "checkpoints"

    def left(newest: int | None, every: int | None, best_step: int | None) -> list[int]:
        for doomed in retain(folder, Retention(newest, every), best_step):
            shutil.rmtree(doomed)
        return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())

    assert left(None, None, None) == [1, 2, 3, 4, 5, 6, 7]
    assert left(4, 3, 1) == [1, 3, 4, 5, 6, 7]
    assert left(2, 3, 1) == [1, 3, 6, 7]
    assert left(1, None, 1) == [1, 7]
    assert left(1, None, None) == [7]


def test_a_former_best_goes_when_it_was_saved_for_that_alone(tmp_path: Path) -> None:
    for step, periodic, best in ((1, False, 1), (2, True, 1), (3, False, 3), (4, False, 3)):
        save_step(tmp_path, step, periodic=periodic, best_step=best)
        assert (tmp_path / "best").read_text() == f"step-{best:08d}\n"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_checkpoint_set_aside_by_hand_does_not_count(tmp_path: Path) -> None:
    newest = save_step(tmp_path, 2)
    shutil.copytree(save_step(tmp_path, 1), newest.with_name("step-00000003.old"))
    (newest.with_name("step-broken")).mkdir()
    assert newest_whole(newest.parent) == newest


def test_a_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_step(tmp_path, 1)

    def save_file(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("farnear.training.saving.save_file", save_file)
    with pytest.raises(UserError, match=r"step 2 was not saved: rank 0 cannot write .* No space left on device"):
        save_step(tmp_path, 2)
    assert list(first.parent.iterdir()) == [first]
    assert load_all(first)


def test_space_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_step(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"step-00000002 was not saved: it takes 0\.00 GB, and .* has 0\.00 GB free"):
        save_step(tmp_path, 2)
    assert list(first.parent.iterdir()) == [first]


def test_a_save_in_the_background_saves_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, strategy = trained_module(seed=0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    saver = saver_of(tmp_path / "checkpoints", ALONE, in_background=True)
    goes_on = _held_back(monkeypatch)
    saver.save(state_of(strategy, module), Progress(1, 1, 2, "f"), periodic=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0)
    assert newest_whole(tmp_path / "checkpoints") is None
    goes_on()
    saver.finish()
    loaded, _ = load_all(tmp_path / "checkpoints" / "step-00000001")
    assert all(torch.equal(before[name], parameter) for name, parameter in loaded.named_parameters())


def _held_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the writing of files wait until what is returned is called."""
    from threading import Event

    event, write = Event(), saving._write_pieces

    def write_late(*arguments: Any) -> Path:
        assert event.wait(20)
        return write(*arguments)

    monkeypatch.setattr(saving, "_write_pieces", write_late)
    return event.set


def test_a_save_that_failed_in_the_background_is_told_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, strategy = trained_module(seed=0)
    saver = saver_of(tmp_path / "checkpoints", ALONE, in_background=True)
    with torch.no_grad():
        next(module.parameters()).fill_(torch.inf)
    saver.save(state_of(strategy, module), Progress(1, 1, 2, "f"), periodic=True)
    with pytest.raises(RunStoppedError, match=r"made 0\.weight non-finite, so nothing was saved"):
        saver.save(state_of(strategy, module), Progress(2, 1, 2, "f"), periodic=True)
    assert not saver.failed
    assert list((tmp_path / "checkpoints").iterdir()) == []
