"""One rank of `farnear encode`: started by it as launch/train.py is by a launch, and of no use otherwise."""

import os
import sys
import traceback

from farnear.commands.encode import rank_command

if __name__ == "__main__":
    try:
        code = rank_command(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Tidying up could wait for ranks that are gone.
        os._exit(code)
