"""Section `slurm` of a run file: what `farnear submit` asks a cluster for.

Nothing here changes what is trained. Names are those of sbatch's options, with `_` for `-`; what has no key of its own
goes into `options` as it is.
"""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from farnear.sections import Section

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


class SlurmConfig(Section):
    """How a job is submitted."""

    account: str | None = None
    """Account that the job is charged to."""
    partition: str | None = None
    """Partition, or several with commas between them; unset: the cluster's default."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    gres: str | None = None
    """Generic resources a node, such as gpu:h100:8, where gpus_per_node is not what the cluster wants."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs of each node, and one rank for each of them; unset: none are asked for by this name."""
    gpu_type: str | None = None
    """Their kind, such as h100, for the plan alone; constraint or gres asks the cluster for it."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node; unset: one for each of the GPUs that the job finds there, or one where there are none."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores of each node for all of its ranks and their data workers."""
    mem: str | None = None
    """Memory of each node, such as 400G; 0 is all of it."""
    time: str = "24:00:00"
    """Time limit, after which the job goes back into the queue: minutes, HH:MM:SS or D-HH:MM:SS."""
    signal_seconds: int | None = Field(default=None, ge=10, le=65535)
    """How long before the time limit a run is told to save; unset: by the time that its saves have taken so far."""
    container: str | None = None
    """Image in which each node trains: srun's --container-image, which the pyxis plugin adds to it."""
    container_mounts: str | None = None
    """What the container sees of the node, as HOST:CONTAINER with commas; the working folder is always mounted."""
    setup: str = ""
    """Shell lines before the start: modules, variables, an environment. Unset: the Python that submits is activated."""
    offline: bool = False
    """Whether nodes have no network: models and shards are taken from what `farnear prefetch` brought."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as they are: --exclusive, --mail-type=END."""

    @field_validator("time", "mem", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError(f"minutes, HH:MM:SS or D-HH:MM:SS, not {value!r}")
        return value

    @field_validator("account", "partition", "qos", "constraint", "gres", "mem", "container", "container_mounts")
    @classmethod
    def _is_one_line(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError(f"a single line, not {value!r}")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("options")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-") or not option.isprintable():
                raise ValueError(f"options of sbatch begin with a dash, such as --exclusive, not {option!r}")
        return value

    @model_validator(mode="after")
    def _mounts_have_a_container(self) -> "SlurmConfig":
        if self.container_mounts and not self.container:
            raise ValueError("container_mounts is set, but container is not")
        return self
