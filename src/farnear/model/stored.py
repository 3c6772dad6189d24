"""The files of a stored checkpoint: what they are, and what it looked like, for an export that looks the same."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file

from farnear.sections import ModelConfig

FLOAT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROUTES = "router_config.json"


@dataclass(frozen=True)
class StoredModel:
    """One of transformers' models in a checkpoint.

    Attributes:
        folder: In the export, relative; empty for its root.
        weight_names: Of every stored tensor; empty where the weights are not safetensors.
        architectures: As its config.json names them.
    """

    folder: str
    weight_names: frozenset[str]
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class BaseCheckpoint:
    """What the stored checkpoint looked like.

    Attributes:
        models: Of a Router several, else one.
        dtype: Type most of the stored elements have; fp32 where the models of a Router differ in it.
    """

    models: tuple[StoredModel, ...]
    dtype: torch.dtype


def describe_base(config: ModelConfig) -> BaseCheckpoint:
    """Names, type and architecture of the stored checkpoint, read from file headers only."""
    found = [_described(at, subfolder, folder) for at, subfolder, folder in _models_of(config)]
    dtypes = {dtype for _, dtype in found if dtype is not None}
    return BaseCheckpoint(tuple(model for model, _ in found), dtypes.pop() if len(dtypes) == 1 else torch.float32)


def _models_of(config: ModelConfig) -> Iterator[tuple[ModelConfig, str, str]]:
    """Of each of transformers' models: the checkpoint that holds it, where in it, and where in the export."""
    for name, tower in config.towers.items():
        yield tower, "", f"{name}_0_Transformer"
    if config.towers:
        return
    routes = stored_file(config, ROUTES)
    if routes is None:
        yield config, "", ""
        return
    for name, kind in json.loads(routes.read_text(encoding="utf-8"))["types"].items():
        if kind.rpartition(".")[2] == "Transformer":
            yield config, f"{name}/", name


def _described(config: ModelConfig, subfolder: str, folder: str) -> tuple[StoredModel, torch.dtype | None]:
    weight_names: set[str] = set()
    elements: dict[torch.dtype, int] = {}
    for path in weight_files(config, subfolder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                weight_names.add(name)
                tensor = file.get_slice(name)
                if (dtype := FLOAT_TYPES.get(tensor.get_dtype())) is not None:
                    elements[dtype] = elements.get(dtype, 0) + torch.Size(tensor.get_shape()).numel()
    architectures = stored_config(config, subfolder).get("architectures") or ()
    model = StoredModel(folder, frozenset(weight_names), tuple(architectures))
    return model, max(elements, key=lambda kind: elements[kind]) if elements else None


def stored_kind(config: ModelConfig) -> str | None:
    """SentenceTransformer or CrossEncoder, as a checkpoint that sentence-transformers has saved says; else None."""
    about = stored_file(config, "config_sentence_transformers.json")
    kind: str | None = json.loads(about.read_text(encoding="utf-8")).get("model_type") if about else None
    return kind


def weight_files(config: ModelConfig, subfolder: str = "") -> list[Path]:
    """The checkpoint's safetensors; empty where it has others. A subfolder ends in a slash."""
    index = stored_file(config, f"{subfolder}model.safetensors.index.json")
    if index is None:
        single = stored_file(config, f"{subfolder}model.safetensors")
        return [single] if single else []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for name in names if (path := stored_file(config, subfolder + name)) is not None]


def stored_config(config: ModelConfig, subfolder: str = "") -> dict[str, Any]:
    """The checkpoint's config.json; empty where there is none."""
    path = stored_file(config, f"{subfolder}config.json")
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def stored_configs(config: ModelConfig) -> list[dict[str, Any]]:
    """The config.json of each of transformers' models in the checkpoint."""
    return [stored_config(at, subfolder) for at, subfolder, _ in _models_of(config)]


def stored_file(config: ModelConfig, name: str) -> Path | None:
    """One of the checkpoint's files, brought from the hub if need be; None where it has none of that name."""
    found = cached_file(
        config.name_or_path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None
