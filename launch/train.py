"""Trains one model: what accelerate and srun start, one process a GPU.

    accelerate launch --config_file accelerate_configs/zero2.yaml launch/train.py RUN.yaml training.learning_rate=1e-5
    accelerate launch --config_file accelerate_configs/zero2.yaml launch/train.py RUN.yaml --resume auto
    python launch/train.py RUN.yaml strategy=single

`farnear launch RUN.yaml` prints and runs the right one of these.

Exit codes: 0 the run is done; 75 a signal has stopped it and --resume goes on; 2 a mistake in what it was given; 1
anything else. `status.json` in the run folder tells more.
"""

import os
import sys
import traceback

from farnear.cli import train_command
from farnear.rank_logs import log_to_own_file

if __name__ == "__main__":
    terminal = None
    try:
        terminal = log_to_own_file()
        code = train_command(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        if terminal is not None:
            traceback.print_exc(file=terminal)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Other ranks learn that this one has failed when its process is gone; tidying up could wait for them.
        os._exit(code)
