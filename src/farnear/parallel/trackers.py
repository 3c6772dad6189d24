"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate, beside the run's own JSON lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from farnear.errors import UserError


class Trackers:
    """Trackers by accelerate's names (tensorboard, wandb, ...), beside the JSON lines."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers = []
        if not names:
            return
        # accelerate's own bookkeeping, which its trackers ask who may write; the process group stands already.
        PartialState(cpu=not torch.cuda.is_available())
        available = {str(kind): kind for kind in LOGGER_TYPE_TO_CLASS}
        for name in names:
            if name not in available:
                raise UserError(
                    f"training.report_to names '{name}', which accelerate does not know; "
                    f"choose from {', '.join(sorted(available))}"
                )
            if not filter_trackers([name], folder):
                raise UserError(
                    f"training.report_to names {name}, which is not installed; pip install {name}, or take it out"
                )
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            arguments = {"logging_dir": str(folder)} if tracker_class.requires_logging_directory else {}
            tracker = tracker_class(folder.name, **arguments)
            tracker.start()
            tracker.store_init_configuration(_flat(config))
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send figures of one step."""
        flat = _flat(values)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in flat.items() if isinstance(value, (int, float))}, step=step)

    def close(self) -> None:
        """Flush and end."""
        for tracker in self._trackers:
            tracker.finish()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
