"""One rank of `farnear doctor`: started by it as launch/train.py is by a launch, and of no use otherwise."""

import os
import sys

from farnear.commands.doctor import rank_command

if __name__ == "__main__":
    code = rank_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Tidying up could wait for ranks that are gone.
        os._exit(code)
