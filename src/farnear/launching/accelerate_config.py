"""A user's own accelerate config, looked at before anything starts.

Ranks compare all of what the config told their launcher with the run file (`farnear.parallel.world`). What would start
something else than a training's ranks is told here, in place of half a minute later.
"""

from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.yaml_text import read_yaml

# These start one process without a word, or prepare the model in a way of their own.
_NOT_FOR_RANKS = {
    "NO": "starts a single process",
    "MULTI_CPU": "starts a single process unless mpirun does it",
    "FSDP": "has accelerate shard the model its own way",
    "MEGATRON_LM": "is for another trainer",
}


def check_config_file(path: Path, strategy: str) -> None:
    """Whether an accelerate config starts the ranks of a strategy.

    Raises:
        UserError: It does not, or cannot be read.
    """
    ours = f"accelerate_configs/{strategy}.yaml"
    try:
        config: Any = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"accelerate config {path} cannot be read ({error.strerror}); name an existing file or drop --config_file"
        ) from None
    except ValueError as error:
        raise UserError(f"accelerate config {path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"accelerate config {path} holds no keys; begin with a copy of {ours}")
    kind = str(config.get("distributed_type", "NO"))
    if config.get("use_cpu") is True:
        raise UserError(f"accelerate config {path} says use_cpu: true, which starts a single process; take it out")
    if kind in _NOT_FOR_RANKS:
        raise UserError(
            f"accelerate config {path} says distributed_type: {kind}, which {_NOT_FOR_RANKS[kind]}; "
            f"begin with a copy of {ours}"
        )
    if (kind == "DEEPSPEED") != strategy.startswith("zero"):
        raise UserError(
            f"accelerate config {path} says distributed_type: {kind}, but the run file strategy={strategy}; "
            f"use {ours}, or change the strategy"
        )
