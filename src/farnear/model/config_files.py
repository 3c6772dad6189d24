"""Where a model is described, before it is built: its config.json, those of a Router's models, what stands behind them.

Nothing is downloaded. A file is looked for in the model's folder, in the hub's cache on this machine, beside the run
file in a folder named like the model (`qwen3-vl-embedding-2b/` for `Qwen/Qwen3-VL-Embedding-2B`), and beside the run
file itself.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.model.declared import Declared, read_declared
from farnear.model.stored import ROUTES
from farnear.sections import ModelConfig

CONFIG = "config.json"


@dataclass(frozen=True)
class TowerFiles:
    """One of transformers' models, and the layers of sentence-transformers behind it.

    Attributes:
        folder: Holds its config.json.
        dense: Place of each linear layer among the modules, and its config.json.
        modules: How many there are, transformer included; None where nothing says so.
    """

    folder: Path
    dense: tuple[tuple[int, Path], ...] = ()
    modules: int | None = None


@dataclass(frozen=True)
class RouterFiles:
    """A Router that was stored.

    Attributes:
        towers: By route; the same object where routes share their modules.
        mappings: From (side, kind) to a route; None stands for any.
        default: Route of what no mapping names.
    """

    towers: Mapping[str, TowerFiles]
    mappings: Mapping[tuple[Any, Any], str]
    default: str | None


def find_model(config: ModelConfig, run_file: Path, *, is_one_of_several: bool = False) -> TowerFiles | RouterFiles:
    """What describes the model of a section that names one.

    Args:
        is_one_of_several: A config.json beside the run file may then be another's.

    Raises:
        UserError: It is nowhere, or a Router of parts that cannot be planned.
    """
    folder = _find_folder(config, run_file, is_one_of_several=is_one_of_several)
    if (folder / ROUTES).is_file():
        return _stored_router(read_declared(folder / ROUTES), folder)
    dense = sorted((_place(path.parent.name), path) for path in folder.glob(f"*_Dense/{CONFIG}"))
    return TowerFiles(folder, tuple(dense), len(stored_modules(folder)) or None)


def stored_modules(folder: Path) -> list[str]:
    """Classes of the modules that a model of sentence-transformers has; empty where it is none."""
    path = folder / "modules.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [str(module["type"]).rpartition(".")[2] for module in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy the model's own there") from None


def _find_folder(config: ModelConfig, run_file: Path, *, is_one_of_several: bool) -> Path:
    name = config.name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / file).is_file() for file in (CONFIG, ROUTES)):
            return folder
        raise UserError(f"model folder {folder} has no config.json, by which memory is planned; copy it there")
    last = name.rstrip("/").rpartition("/")[2]
    beside = [run_file.parent / last, run_file.parent / last.lower()]
    beside += [] if is_one_of_several else [run_file.parent]
    from huggingface_hub import try_to_load_from_cache

    # A path of more parts is a folder that is not here.
    for file in (CONFIG, ROUTES) if name.count("/") <= 1 else ():
        cached = try_to_load_from_cache(name, file, revision=config.revision)
        if isinstance(cached, str):
            return Path(cached).parent
    for place in beside:
        if (place / CONFIG).is_file():
            return place
    raise UserError(
        f"there is no model folder {name} here, and the config.json of the hub's model of that name, by which memory "
        "is planned, is neither in the hub's cache nor beside the run file; correct model.name_or_path, run `farnear "
        f"prefetch {run_file}` where there is a network, or put it into {run_file.parent / last.lower()}/config.json"
    )


def _stored_router(stored: Declared, folder: Path) -> RouterFiles:
    types, structure, parameters = (stored.section(key) for key in ("types", "structure", "parameters"))
    try:
        kinds = {name: str(kind).rpartition(".")[2] for name, kind in types.values.items()}  # type: ignore[union-attr]
        routes = {str(route): [str(name) for name in names] for route, names in structure.values.items()}  # type: ignore[union-attr]
        named = parameters.values.get("route_mappings") or {}  # type: ignore[union-attr]
        default = parameters.values.get("default_route")  # type: ignore[union-attr]
        mappings = {ast.literal_eval(key): str(route) for key, route in named.items()}
        firsts = {route: names[0] for route, names in routes.items()}
    except (AttributeError, TypeError, ValueError, SyntaxError, IndexError) as error:
        raise UserError(f"{stored.place} cannot be read ({error}); copy the model's own file there") from None
    towers: dict[str, TowerFiles] = {}
    for route, names in routes.items():
        dense = ((place, folder / name / CONFIG) for place, name in enumerate(names) if kinds.get(name) == "Dense")
        tower = TowerFiles(folder / names[0], tuple(dense), len(names))
        same = next((other for other, first in firsts.items() if first == names[0] and other in towers), None)
        is_known = kinds.get(names[0]) == "Transformer" and (tower.folder / CONFIG).is_file()
        if not is_known or (same is not None and towers[same] != tower):
            raise UserError(
                f"the Router in {folder} has a route '{route}' of which {names[0]} is no model that a config.json "
                "alone describes, so its memory and time cannot be planned; start it with a small training.max_steps "
                "to see them in metrics.jsonl, and submit it with --no-plan"
            )
        towers[route] = tower if same is None else towers[same]
    return RouterFiles(towers, mappings, default)


def _place(name: str) -> int:
    """Of a module among others, by the name of its folder, such as 2_Dense."""
    number = name.partition("_")[0]
    return int(number) if number.isdigit() else 0
