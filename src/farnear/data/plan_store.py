"""Plans on disk: computed once a node, mapped by all of its processes.

A plan of a million pairs takes seconds to compute and nothing to map. So the first process of a node that asks for one
computes it, while the others wait for its lock, and keeps it as a file beside the index. The file's name is a digest of
all that decides the order; its header holds the hash of the order, which is compared when the file is opened: a file
that is torn or damaged is computed again and never trusted. Whoever looks for a file sees the whole new one or none.

Few plans are kept. One that is removed while a process has it mapped stays readable there.
"""

import hashlib
import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from farnear.data.plan import ORDER_VERSION, PairFacts, Plan, PlanSettings, hash_rows, plan_epoch
from farnear.errors import UserError
from farnear.files import locked, published

FORMAT_VERSION = 1
PLANS_KEPT = 8

_HEADER_FIELDS = tuple(field.name for field in fields(Plan) if field.name != "rows_SG")
_SECONDS_A_WRITER_TAKES = 3600  # what is older was left by one that was killed


def stored_plan(folder: Path, facts: PairFacts, settings: PlanSettings, epoch: int) -> Plan:
    """The plan of an epoch from ``folder``, where it is computed and kept if it is not there; rows are read-only.

    Safe to call from any number of processes at once. Raises ``UserError`` for a folder that cannot be written to, and
    as ``plan_epoch`` does.
    """
    path = folder / f"plan-{_digest(facts, settings, epoch)}.arrow"
    if plan := _opened(path):
        return plan
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "plans.lock"):
            if plan := _opened(path):
                return plan
            plan = plan_epoch(facts, settings, epoch)
            _publish(plan, path)
            _remove_old(folder, path)
    except OSError as error:
        raise UserError(
            f"the plan of epoch {epoch} cannot be kept in {folder} ({error.strerror or error}), and each process would "
            "compute its own; make the folder one that can be written to, with space on its disk"
        ) from None
    return _opened(path) or plan


def _digest(facts: PairFacts, settings: PlanSettings, epoch: int) -> str:
    decides = {
        "versions": (FORMAT_VERSION, ORDER_VERSION),
        "fingerprint": facts.fingerprint,
        "source_starts": facts.source_start_K1.tolist(),
        "settings": asdict(settings),
        "epoch": epoch,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def _publish(plan: Plan, path: Path) -> None:
    header = json.dumps({**{name: getattr(plan, name) for name in _HEADER_FIELDS}, "shape": plan.rows_SG.shape})
    batch = pa.record_batch([pa.array(plan.rows_SG.ravel())], names=["rows"])
    schema = batch.schema.with_metadata({b"header": header, b"header_hash": _header_hash(header)})
    with published(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def _opened(path: Path) -> Plan | None:
    """The plan in a file, or None if there is none, or not the one that was written."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        metadata = reader.schema.metadata or {}
        header_text = metadata.get(b"header", b"").decode()
        if metadata.get(b"header_hash", b"").decode() != _header_hash(header_text):
            return None
        header: dict[str, Any] = json.loads(header_text)
        rows_SG = reader.get_batch(0).column("rows").to_numpy(zero_copy_only=True).reshape(header.pop("shape"))
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    if rows_SG.dtype != np.int64 or hash_rows(rows_SG) != header["order_hash"]:
        return None
    return Plan(**{**header, "passes": tuple(header["passes"])}, rows_SG=rows_SG)


def _header_hash(header: str) -> str:
    return hashlib.blake2b(header.encode(), digest_size=16).hexdigest()


def _remove_old(folder: Path, newest: Path) -> None:
    """Remove all but the newest plans, and what killed writers left."""
    plans = sorted((path for path in folder.glob("plan-*.arrow") if path != newest), key=_written, reverse=True)
    long_ago = time.time() - _SECONDS_A_WRITER_TAKES
    torn = [path for path in folder.glob(".plan-*.tmp") if _written(path) < long_ago]
    for path in (*plans[PLANS_KEPT - 1 :], *torn):
        path.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """When a file was written; another node may remove it meanwhile, which makes it oldest."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
