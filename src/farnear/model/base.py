"""What a run's base model is to others: its name without a path, its commit, and the licence that its own card names.

A revision such as `main` stands for another commit tomorrow, and an export reads the base once more at the end of a
run. So a run finds out at its start which commit it has, and holds on to that one. On the hub's side this takes no
request beyond those of loading; without a network the hub's cache knows.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from farnear.export_folder import CARD
from farnear.model.card_facts import UNKNOWN, BaseFacts
from farnear.model.hub import MODULES, is_folder, refuse_absent
from farnear.model.load import told_to_the_user
from farnear.model.stored import stored_file
from farnear.sections import ModelConfig

NAME = "model.name_or_path"

_COMMIT = re.compile(r"[0-9a-f]{40}")


def base_commits(config: ModelConfig) -> dict[str, str]:
    """The commits that the models on the hub are at, by the key of the run file that names each (`ModelConfig.by_key`).

    Raises:
        UserError: A model is not on the hub, or not in its cache where there is no network.
    """
    found = {key: base_commit(one) for key, one in config.by_key.items()}
    return {key: commit for key, commit in found.items() if commit is not None}


def base_commit(config: ModelConfig) -> str | None:
    """The commit that a model's revision stands for; None of a folder.

    Raises:
        UserError: The model is not on the hub, or not in its cache where there is no network.
    """
    name, revision = config.name_or_path, config.revision
    if is_folder(name):
        return None
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    refuse_absent(config)
    with told_to_the_user(config):
        # Files of the cache lie in snapshots/COMMIT; a raw model has no modules, and a Router no config.
        found = stored_file(config, MODULES) or stored_file(config, "config.json")
    commits = [part for part in (found.parts if found else ()) if _COMMIT.fullmatch(part)]
    return commits[-1] if commits else None


def at_commits(config: ModelConfig, commits: Mapping[str, str]) -> ModelConfig:
    """The section with its models held to commits, which are by the key that names each."""
    if config.router is None:
        return config.model_copy(update={"revision": commits[NAME]}) if NAME in commits else config
    held = {
        route: tower.model_copy(update={"revision": commits[key]})
        for route, tower in config.router.by_route.items()
        if (key := f"model.router.{route}") in commits
    }
    return config.model_copy(update={"router": config.router.model_copy(update=held)})


def bases_facts(config: ModelConfig, commits: Mapping[str, str]) -> tuple[BaseFacts, ...]:
    """What a card says of the base models: one, or those that are joined."""
    return tuple(base_facts(one, commits.get(key)) for key, one in config.by_key.items())


def base_facts(config: ModelConfig, commit: str | None) -> BaseFacts:
    """What a card says of a base model at a commit, or in its folder."""
    own = _metadata(config if commit is None else config.model_copy(update={"revision": commit}))
    license_name = own.get("license")
    if license_name == "other":
        license_name = own.get("license_name") or license_name
    if is_folder(config.name_or_path):
        made_from = own.get("base_model")
        names = [made_from] if isinstance(made_from, str) else made_from if isinstance(made_from, list) else []
        name = Path(config.name_or_path).expanduser().resolve().name
        return BaseFacts(name=name, is_on_hub=False, license=_text(license_name), made_from=tuple(map(str, names)))
    return BaseFacts(
        name=config.name_or_path,
        is_on_hub=True,
        revision=config.revision,
        commit=commit,
        license=_text(license_name),
    )


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return value if isinstance(value, str) and value != UNKNOWN else None


def _metadata(config: ModelConfig) -> dict[str, Any]:
    """Of the base's own card; empty where it has none, or one that nobody can read."""
    from huggingface_hub.repocard import metadata_load

    path = None
    with suppress(Exception):  # a model whose card cannot be had is trained all the same
        path = stored_file(config, CARD)
        return dict(metadata_load(path) or {}) if path else {}
    return {}
