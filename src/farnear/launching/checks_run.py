"""The doctor's checks of what a run file names: model, attention, output folder, shards and what is wrong with them."""

import fcntl
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from farnear.config import RunConfig
from farnear.data.faults import pairs_lost
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, cache_folder, cached_index, index_at_hand
from farnear.data.losses import losses_of
from farnear.data.remote import RemoteFacts, is_remote, read_range, shown
from farnear.data.run_shards import shard_sets, shard_store
from farnear.data.shard_store import ShardFacts, ShardStore
from farnear.errors import UserError
from farnear.launching.findings import Finding, Subject, elements_in, existing, fail, failed_by, gigabytes, note, ok
from farnear.run_folder import RunFolder, check_start, published_checkpoints
from farnear.sections import ModelConfig
from farnear.wording import counted

# Scanning reads every byte. What takes longer than some seconds is left to `farnear shards index`.
SCANNED_HERE_BYTES = 2e9
BLOCK = 4096
FAILURES_TOLD = 3


def model(subject: Subject) -> list[Finding]:
    """Whether the model is in a folder here, in the hub's cache, or on the hub."""
    found = []
    for key, config in _run(subject).model.by_key.items():
        found += [replace(one, do=one.do.replace("model.name_or_path", key)) for one in _model(config, subject)]
    return found


def _model(config: ModelConfig, subject: Subject) -> list[Finding]:
    name = config.name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights = [path for kind in ("*.safetensors", "*/*.safetensors", "*.bin") for path in folder.glob(kind)]
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            return fail(
                f"{folder} holds no config.json and no modules.json", "set model.name_or_path to a model's folder"
            )
        if not weights:
            return fail(f"{folder} holds no weights (*.safetensors)", "copy them there; a clone may hold pointers only")
        size = sum(path.stat().st_size for path in weights)
        parameters = elements_in(folder)
        count = f"{parameters / 1e6:,.1f} M parameters, " if parameters else ""
        return ok(f"{folder}: {count}{gigabytes(size)} of weights")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return fail(f"there is no model folder {folder.absolute()}", "correct model.name_or_path")
    return _on_the_hub(name, config.revision, subject.seconds)


def _on_the_hub(name: str, revision: str | None, seconds: float) -> list[Finding]:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found = (try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "modules.json"))
    is_cached = any(isinstance(path, str) for path in found)
    where = f"the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        if is_cached:
            return ok(f"{name} is in {where}, and HF_HUB_OFFLINE is set")
        return fail(
            f"there is no folder {name} here, {name} is not in {where}, and HF_HUB_OFFLINE is set",
            "bring it where there is a network: farnear prefetch RUN.yaml, with HF_HOME on a disk of both",
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=min(seconds, 20))
    except Exception as error:  # of the hub's client, of the network
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if is_cached:
            return note(f"{name} is in {where}, but the hub cannot be asked ({reason})", "set HF_HUB_OFFLINE=1")
        if isinstance(error, (HfHubHTTPError, HFValidationError)):  # the hub has answered, or knows no such names
            return fail(
                f"there is no folder {name} here, and the hub says: {reason}", "correct model.name_or_path, or log in"
            )
        return fail(
            f"there is no folder {name} here, {name} is not in {where}, and the hub cannot be asked ({reason})",
            "correct model.name_or_path if a folder is meant; else there is no network here: farnear prefetch RUN.yaml "
            "where there is one",
        )
    if is_cached:
        return ok(f"{name} is in {where}")
    return note(
        f"{name} is on the hub and not yet here", "fetch it before ranks wait for it: farnear prefetch RUN.yaml"
    )


def attention(subject: Subject) -> list[Finding]:
    """Whether the chosen attention can be computed here, as a training asks it before it loads the model."""
    import torch

    from farnear.model.attention_choice import check_attention, refuse_kernels

    config = _run(subject)
    name = config.model.attn_implementation
    training = config.training
    device = torch.device("cuda" if subject.gpus else "cpu")
    try:
        refuse_kernels(config.model, {})
        check_attention(config.model, device, half_precision=training.precision != "fp32")
    except UserError as error:
        return failed_by(error)
    return ok(f"{name or 'left to transformers'}, on {device.type}")


def output_dir(subject: Subject) -> list[Finding]:
    """Whether a run may start in its folder. Looks, and changes nothing there."""
    folder = RunFolder(Path(_run(subject).output_dir))
    place = existing(folder.path)
    if not place.is_dir():
        return fail(
            f"{place} is a file, and output_dir {folder.path} would be a folder there", "set another output_dir"
        )
    try:
        # A file without a name: nobody sees it, and it goes with its descriptor.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail(
            f"{place} cannot be written ({error.strerror}), so output_dir {folder.path} could not be made or filled",
            "check its permissions, its mount and its space, or set another output_dir",
        )
    if folder.lock.exists() and _is_locked(folder.lock):
        return fail(f"another run is writing into {folder.path}", "wait for it, or set another output_dir")
    if published := published_checkpoints(folder.checkpoints):
        return note(
            f"{folder.path} holds checkpoints up to {published[-1].name}",
            "a launch continues it with --resume; for a new run set another output_dir",
        )
    try:
        check_start(folder.path, None)
    except UserError as error:
        return failed_by(error)
    return ok(f"{folder.path} can be written and claimed")


def _is_locked(lock: Path) -> bool:
    with open(lock, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def shards(subject: Subject) -> list[Finding]:
    """Every shard: whether it is there, and whether its first and last block can be read."""
    config = _run(subject)
    store, sets = _sets(config)
    names = list(dict.fromkeys(shard for shard_set in sets.values() for shard, _ in shard_set.shards()))
    bad: list[str] = []
    size = 0
    for name in names:
        try:
            facts = store.facts(name)
            _read_ends(facts)
        except (UserError, OSError) as error:
            bad.append(str(error).split("; ")[0])
            if len(bad) == FAILURES_TOLD:  # a server that is down is asked about some shards only
                break
        else:
            size += facts.size
    if bad:
        return fail(
            f"{counted(len(bad), 'shard')} of {len(names):,} cannot be read: {' | '.join(bad)}",
            "bring them back, or take them out of the section data",
        )
    remote = sum(map(is_remote, names))
    return ok(
        f"{counted(len(names), 'shard')} reached, {gigabytes(size)}" + (f", {remote} behind URLs" if remote else "")
    )


def _read_ends(facts: ShardFacts) -> None:
    if is_remote(facts.shard):
        read_range(facts.shard, 0, min(1, facts.size), RemoteFacts(facts.size, facts.etag))
        return
    with open(facts.shard, "rb") as file:
        file.read(BLOCK)
        file.seek(max(0, facts.size - BLOCK))
        file.read(BLOCK)


def index(subject: Subject) -> list[Finding]:
    """What the scan of the shards found; they are scanned now where that takes seconds."""
    config = _run(subject)
    store, sets = _sets(config)
    cache = cache_folder(config.data.cache_dir)
    findings: list[Finding] = []
    for name, shard_set in sets.items():
        facts = {shard: store.facts(shard) for shard, _ in shard_set.shards()}
        size = sum(fact.size for fact in facts.values())
        found = index_at_hand(shard_set, cache, facts)
        if found is None and size > SCANNED_HERE_BYTES:
            findings += note(
                f"{name} shards are not indexed yet, {gigabytes(size)} to read",
                "farnear shards index RUN.yaml does it now, and the doctor then tells their faults and decodes pages",
            )
            continue
        found = found or cached_index(shard_set, cache, replace(store, known=facts))
        findings += _faults(found, name, config.data.max_bad_fraction)
    return findings


def _faults(found: Index, name: str, max_bad_fraction: float) -> list[Finding]:
    what = f"{counted(len(found), f'{name} pair')} in {counted(len(found.shards), 'shard')}"
    if not found.faults:
        return ok(what)
    first = found.faults[0]
    what += (
        f", {counted(len(found.faults), 'fault')} cost at least {counted(pairs_lost(found.faults), 'pair')}; "
        f"the first: {shown(first.shard)} at byte {first.offset}: {first.detail}"
    )
    if losses_of(found).share(len(found)) > max_bad_fraction:
        return fail(
            f"{what}: above data.max_bad_fraction ({max_bad_fraction:g}), where a run stops",
            "farnear shards verify RUN.yaml lists all; write or copy the shards again",
        )
    return note(what, "they are left out; farnear shards verify RUN.yaml lists all")


def is_indexed(config: RunConfig) -> bool:
    """Whether ranks find the index of the training shards, and need not scan."""
    store, sets = _sets(config)
    facts = {shard: store.facts(shard) for shard, _ in sets["training"].shards()}
    small = sum(fact.size for fact in facts.values()) <= SCANNED_HERE_BYTES
    return small or index_at_hand(sets["training"], cache_folder(config.data.cache_dir), facts) is not None


def _sets(config: RunConfig) -> tuple[ShardStore, dict[str, ShardSet]]:
    store = shard_store(config.data, cache_folder(config.data.cache_dir))
    train, evaluated = shard_sets(config.data, store.expand)
    return store, {"training": train, **({"evaluation": evaluated} if evaluated is not None else {})}


def _run(subject: Subject) -> RunConfig:
    assert subject.config is not None, "this check is of a run"
    return subject.config
