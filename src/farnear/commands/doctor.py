"""`farnear doctor`: what would stop a run or slow it down, found before it waits in a queue."""

import argparse
import os
import traceback
from pathlib import Path

from farnear.command_line import Parser, parse, positive
from farnear.environment import prepare_environment
from farnear.errors import UserError, as_user_error
from farnear.noise import quiet
from farnear.outcome import tell
from farnear.processes import end_with_parent

CHECKS = {
    "versions": "Python and the packages that farnear needs",
    "gpus": "driver, memory, other processes, memory errors",
    "interconnect": "how the GPUs are joined",
    "ranks": "processes against GPUs and cores",
    "files": "the limit of open files",
    "shm": "shared memory for what data workers prepare",
    "memory": "host memory, and the limit of the container",
    "disk": "space for checkpoints, indexes and shards",
    "compiler": "what compiles operators",
    "model": "whether it can be found",
    "attention": "whether it can be computed here",
    "output_dir": "whether a run may start there",
    "shards": "whether each can be reached and read",
    "index": "what is wrong with the shards",
    "launch": "accelerate's and DeepSpeed's configs, and whether ranks meet",
    "bandwidth": "all-reduce and all-gather",
    "gradient": "cached against plain, of your model and loss",
    "decode": "pages a core against what the step needs",
}


def add_doctor(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="find what would stop a run or slow it down",
        description="Look at this machine, and with a run file at its model, shards, output folder and gradient, with "
        "as many ranks as a launch would start. One line a finding: ok, note or FAIL, the figure, what to do. Exits "
        "with 2 if a check fails. Nothing is left behind but the index of the shards, which the run would make too.",
        epilog="checks:\n"
        + "\n".join(f"  {name:<13} {what}" for name, what in CHECKS.items())
        + "\n\nexamples:\n  farnear doctor\n  farnear doctor run.yaml strategy=zero2\n"
        "  farnear doctor run.yaml --skip gradient,bandwidth\n\ndocs/doctor.md says what each means and what to do.",
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, nargs="?", help="the run file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    parser.add_argument("--config_file", type=Path, help="an accelerate config, instead of the strategy's own")
    parser.add_argument("--num_processes", type=positive, help="ranks; wins over the run file's num_processes")
    parser.add_argument("--only", metavar="CHECK[,CHECK]", type=_names, help="run these checks alone")
    parser.add_argument("--skip", metavar="CHECK[,CHECK]", type=_names, default=(), help="leave these out")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        default=60,
        help="of each check; the gradient has ten times as long (default: %(default)s)",
    )
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from farnear.launching.doctor import examine

    chosen = [name for name in arguments.only or CHECKS if name not in arguments.skip]
    return examine(
        arguments.run_file,
        arguments.overrides,
        chosen,
        config_file=arguments.config_file,
        num_processes=arguments.num_processes,
        seconds=arguments.timeout,
    )


def rank_command(words: list[str]) -> int:
    """What launch/doctor.py does on each rank. Returns the exit code."""
    from farnear.config import load_config

    parser = Parser(prog="launch/doctor.py", description="One rank of farnear doctor.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("wanted", type=_names)
    parser.add_argument("seconds", type=float)
    parser.add_argument("run_file", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", default=[])
    try:
        arguments = parse(parser, words)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(os.getppid())
        config = load_config(arguments.run_file, arguments.overrides) if arguments.run_file else None
        prepare_environment()
        quiet()
        from farnear.training.doctor_ranks import examine

        examine(config, arguments.wanted, arguments.folder, arguments.seconds)
        return 0
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    except Exception as error:
        traceback.print_exc()
        mistake = UserError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; the traceback is above")
    tell(mistake)
    return mistake.exit_code


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in CHECKS:
            raise argparse.ArgumentTypeError(f"'{name}' is no check; they are {', '.join(CHECKS)}")
    return names
