"""The flywheel file: several trainings and minings in one YAML, each with the results of those before it.

    output_dir: runs/flywheel
    data: {train: train-*.tar, eval: eval-*.tar}            # whatever all stages share: keys of a run file
    stages:
      embedder:
        train: {model: {name_or_path: Qwen/Qwen3-VL-Embedding-2B}}
      negatives:
        mine: {model: {name_or_path: "{embedder}"}}
      reranker:
        train:
          model: {name_or_path: Qwen/Qwen3-VL-Reranker-2B}
          data: {negatives: "{negatives}"}
          reranker: {}
          evaluation: {embedder: "{embedder}"}

A stage is a training or a mining, and what stands below is a run file, put over what all share: sections key by key.
``{NAME}`` as a whole value is what an earlier stage leaves: a training its export, a mining its negatives.jsonl
(``{NAME.embeddings}``: the folder of its embeddings). So a stage can only need those before it, and the file reads as
it runs, from top to bottom. Every stage has a folder of its name in output_dir, and its run file, complete, beside it.
"""

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from farnear.config import RunConfig, apply_override, parse_config, read_tree
from farnear.errors import UserError

Does = Literal["train", "mine"]

_NAME = re.compile(r"[A-Za-z][\w-]*")
_REFERENCE = re.compile(r"\{([A-Za-z][\w-]*)(?:\.(\w+))?\}")
_LEAVES: Mapping[Does, Mapping[str | None, str]] = {
    "train": {None: "export"},
    "mine": {None: "negatives.jsonl", "embeddings": "embeddings"},
}


@dataclass(frozen=True)
class Stage:
    """A training or a mining.

    Attributes:
        folder: What it leaves is there.
        config: Its run file.
        tree: The same as it is written, references replaced.
        needs: Names of the stages whose results it names.
    """

    name: str
    does: Does
    folder: Path
    config: RunConfig
    tree: Mapping[str, Any]
    needs: tuple[str, ...]

    @property
    def run_file(self) -> Path:
        """Where it is written to."""
        return self.folder.parent / f"{self.name}.yaml"


@dataclass(frozen=True)
class Flywheel:
    """All stages, in the order in which they run."""

    folder: Path
    stages: tuple[Stage, ...]


def is_flywheel(path: Path) -> bool:
    """Whether a file has stages. Raises UserError where it cannot be read."""
    return "stages" in read_tree(path)


def read_flywheel(path: Path, overrides: Sequence[str] = ()) -> Flywheel:
    """Read a flywheel file, apply dotted overrides, and validate every stage.

    Args:
        overrides: `stages.NAME.train.section.key=value` for one stage; `section.key=value` for all stages, in place of
            what they and the file say.

    Raises:
        UserError: Naming the stage, and what is wrong in it.
    """
    tree = read_tree(path)
    names = list(_stages(path, tree))
    for override in overrides:
        apply_override(tree, override)
    stages = _stages(path, tree)
    if added := [name for name in stages if name not in names]:
        near = difflib.get_close_matches(str(added[0]), map(str, names), 1)
        raise UserError(
            f"override stages.{added[0]}: {path} has no such stage; "
            + (f"did you mean stages.{near[0]}?" if near else f"there are {', '.join(map(str, names))}")
        )
    del tree["stages"]
    if not isinstance(tree.get("output_dir"), str):
        raise UserError(f"{path}: output_dir is missing; every stage gets a folder of its name there")
    folder = Path(tree["output_dir"])
    read: dict[str, Stage] = {}
    for name, body in stages.items():
        does, own = _own(f"{path}, stage {name}", str(name), body)
        of_all = [one for one in overrides if not one.startswith(("stages.", "output_dir="))]
        of_stage = f"stages.{name}.{does}."
        for override in (*of_all, *(one.removeprefix(of_stage) for one in overrides if one.startswith(of_stage))):
            apply_override(own, override)
        read[name] = _stage(str(path), str(name), does, _merged(tree, own), folder, read, list(stages))
        if read[name].run_file.absolute() == path.absolute():
            raise UserError(f"{path}, stage {name}: its run file would replace this file; give it another name")
    return Flywheel(folder, tuple(read.values()))


def _stages(path: Path, tree: Mapping[str, Any]) -> dict[Any, Any]:
    stages = tree["stages"]
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{path}: stages holds none; write a name for each, and below it train or mine")
    return stages


def _own(where: str, name: str, body: Any) -> tuple[Does, dict[str, Any]]:
    """What a stage does, and its own keys."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: a name is a letter, then letters, digits, - and _, for it names a folder too")
    kinds = get_args(Does)
    if not isinstance(body, dict) or len(body) != 1 or next(iter(body)) not in kinds:
        has = ", ".join(map(str, body)) if isinstance(body, dict) else repr(body)
        raise UserError(f"{where}: holds {has or 'nothing'}; write one key, {' or '.join(kinds)}, and a run file below")
    ((does, own),) = body.items()
    if not isinstance(own, dict) and own is not None:
        raise UserError(f"{where}: {does} is {own!r}; write the keys of a run file below it, or none")
    if "output_dir" in (own or {}):
        raise UserError(f"{where}: output_dir stands once, above the stages; take it out here")
    return does, copy.deepcopy(own or {})


def _stage(
    source: str,
    name: str,
    does: Does,
    merged: Mapping[str, Any],
    folder: Path,
    before: Mapping[str, Stage],
    names: Sequence[str],
) -> Stage:
    where = f"{source}, stage {name}"
    needs: dict[str, None] = {}

    def result(value: str) -> str:
        match = _REFERENCE.fullmatch(value)
        if match is None:
            for part in _REFERENCE.finditer(value):
                if part[1] in names:
                    raise UserError(f"{where}: {value} holds {part[0]}, which is a path only as a whole value")
            return value
        other, part_of = match.groups()
        if other not in before:
            raise UserError(f"{where}: {match[0]} is {_why_none(other, name, names)}")
        leaves = _LEAVES[before[other].does]
        if part_of not in leaves:
            have = " and ".join("{" + other + (f".{one}" if one else "") + "}" for one in leaves)
            raise UserError(f"{where}: stage {other} leaves no {match[0]}; it leaves {have}")
        needs[other] = None
        return str(before[other].folder / leaves[part_of])

    tree = _replaced(merged, result)
    tree["output_dir"] = str(folder / name)
    config = parse_config(tree, source=where)
    if does == "mine" and config.reranker is not None:
        raise UserError(f"{where}: section reranker is a training's; the teacher of a mining is mining.reranker")
    _refuse_misplaced(where, does, config, before)
    return Stage(name, does, folder / name, config, tree, tuple(needs))


def _refuse_misplaced(where: str, does: Does, config: RunConfig, before: Mapping[str, Stage]) -> None:
    """Results of stages stand where such a thing is wanted: embedders, rerankers, negatives, embeddings."""
    kind_of = {}
    for stage in before.values():
        for leaf in _LEAVES[stage.does].values():
            is_reranker = stage.config.reranker is not None
            kind = leaf if stage.does == "mine" else "a reranker" if is_reranker else "an embedder"
            kind_of[str(stage.folder / leaf)] = (kind, stage.name)
    wanted: list[tuple[str, str | None, tuple[str, ...]]] = [
        ("evaluation.embedder", config.evaluation.embedder, ("an embedder",)),
        ("mining.reranker", config.mining.reranker, ("a reranker",)),
        *(("data.negatives", path, ("negatives.jsonl",)) for path in config.data.negatives),
    ]
    models = ("an embedder",) if does == "mine" or config.reranker is None else ("an embedder", "a reranker")
    wanted += [(key, one.name_or_path, models) for key, one in config.model.by_key.items()]
    if config.reranker is not None:
        wanted.append(("reranker.embeddings", config.reranker.embeddings, ("embeddings",)))
    for key, value, kinds in wanted:
        kind, name = kind_of.get(str(value), (kinds[0], ""))
        if kind not in kinds:
            raise UserError(f"{where}: {key} wants {' or '.join(kinds)}, and stage {name} leaves {kind}")


def _why_none(other: str, name: str, names: Sequence[str]) -> str:
    if other == name:
        return "this stage itself; name one above it"
    if other in names:
        return "a stage below this one; stages run from top to bottom, so move it up"
    near = difflib.get_close_matches(other, names, 1)
    return "no stage" + (f"; did you mean {{{near[0]}}}?" if near else f"; there are {', '.join(names)}")


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A run file over what all stages share; sections key by key."""
    merged = copy.deepcopy(dict(shared))
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _replaced(value: Any, result: Callable[[str], str]) -> Any:
    """A tree in which every string is what ``result`` makes of it."""
    if isinstance(value, dict):
        return {key: _replaced(one, result) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, result) for one in value]
    return result(value) if isinstance(value, str) else value
