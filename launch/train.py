"""Trains one model: what accelerate and srun start, one process a GPU.

    accelerate launch --config_file accelerate_configs/zero2.yaml launch/train.py RUN.yaml training.learning_rate=1e-5
    accelerate launch --config_file accelerate_configs/zero2.yaml launch/train.py RUN.yaml --resume auto
    python launch/train.py RUN.yaml strategy=single

`farnear launch RUN.yaml` prints and runs the right one of these.
"""

import sys

from farnear.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
