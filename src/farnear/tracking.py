"""Names of experiment trackers, and whether they are installed: asked before a run starts, without importing any."""

from collections.abc import Sequence
from importlib.util import find_spec

from farnear.errors import UserError

DEFAULT = "tensorboard"
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
"""Of each tracker that accelerate knows, by its name there, the packages of which it needs one."""


def is_installed(name: str) -> bool:
    """Whether a tracker can be used here."""
    # A folder of that name in the working directory, such as wandb leaves, is found too, but has no origin.
    return any((spec := find_spec(package)) is not None and spec.origin is not None for package in PACKAGES[name])


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is none, and for a tracker that is not installed.

    TensorBoard is what a run writes unless it is told otherwise, and nobody has asked for it: a run goes without, and
    says so.
    """
    for name in names:
        if name not in PACKAGES:
            raise UserError(
                f"training.report_to names '{name}', which accelerate does not know; "
                f"choose from {', '.join(sorted(PACKAGES))}, or none"
            )
        if name != DEFAULT and not is_installed(name):
            raise UserError(
                f"training.report_to names {name}, which is not installed; pip install {PACKAGES[name][0]}, "
                "or take it out"
            )
