"""Finds the files that launchers read: `launch/`, `accelerate_configs/`, `ds_configs/`, `slurm/`.

In a clone these folders lie at the top, where people look for them and where ``accelerate launch --config_file
accelerate_configs/zero2.yaml launch/train.py`` finds them. A wheel carries copies inside the package, so that the
commands work where farnear was installed with pip and no clone exists. An editable install has its clone.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_root() -> Path:
    """The folder that holds `launch/`, `accelerate_configs/`, `ds_configs/` and `slurm/`."""
    packaged = _PACKAGE / "_resources"
    # Only a wheel has this folder; in a clone the package lies in src/ under the top.
    return packaged if packaged.is_dir() else _PACKAGE.parents[1]


def resource(path: str | Path) -> Path:
    """Where a file that a config names is.

    Args:
        path: Absolute, or relative such as `ds_configs/zero2.json`.

    Returns:
        The working directory's file if it exists there, so that users can bring their own; else farnear's own, which
        need not exist.
    """
    path = Path(path)
    return path if path.exists() else resource_root() / path
