"""What a machine has to train with, as far as a launch decides by it: its GPUs, or else its cores."""

import os
from dataclasses import dataclass

from farnear.errors import UserError
from farnear.wording import counted


@dataclass(frozen=True)
class Hardware:
    """One machine.

    Attributes:
        gpus: Names of the GPUs that processes started here may use.
        cores: That they may run on.
    """

    gpus: tuple[str, ...]
    cores: int

    @property
    def ranks(self) -> int:
        """As many processes as accelerate starts unless told otherwise."""
        return len(self.gpus) or self.cores

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU, {counted(self.cores, 'core')}"
        kinds = dict.fromkeys(self.gpus)
        return ", ".join(f"{self.gpus.count(kind)} x {kind}" for kind in kinds) + f", {counted(self.cores, 'core')}"

    def refuse_more_ranks(self, ranks: int) -> None:
        """A rank without a GPU would end the run at its start, with many processes to clean up.

        Raises:
            UserError: There are GPUs, but fewer than ``ranks``.
        """
        if self.gpus and ranks > len(self.gpus):
            raise UserError(
                f"{counted(ranks, 'rank')} are asked for on a machine that shows {counted(len(self.gpus), 'GPU')}, and "
                f"each takes one; pass --num_processes {len(self.gpus)}, or look at CUDA_VISIBLE_DEVICES"
            )


def read_hardware() -> Hardware:
    """This machine, as torch sees it."""
    import torch

    gpus = tuple(torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count()))
    return Hardware(gpus, len(os.sched_getaffinity(0)))
