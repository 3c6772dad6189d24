"""One rank of `farnear mine` or `farnear encode`: what launch/mine.py and launch/encode.py do beside the work."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from farnear.command_line import Parser, parse
from farnear.environment import prepare_environment
from farnear.errors import UserError, as_user_error
from farnear.noise import quiet
from farnear.outcome import announce, tell
from farnear.processes import end_with_parent
from farnear.signals import Signals

Work = Callable[[argparse.Namespace, Signals], None]


def work_on_rank(parser: Parser, words: Sequence[str], work: Work) -> int:
    """Work by the words of a launch, and tell the mistake that it meets. Returns the exit code."""
    try:
        arguments = parse(parser, words)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(os.getppid())
        with Signals() as signals:
            announce()
            prepare_environment()
            quiet()
            work(arguments, signals)
        return 0
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    tell(mistake)
    return mistake.exit_code


def end_rank(command: Callable[[list[str]], int]) -> None:
    """Run a rank's command by the words of this process, and end the process by its exit code."""
    try:
        code = command(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Tidying up could wait for ranks that are gone.
        os._exit(code)
