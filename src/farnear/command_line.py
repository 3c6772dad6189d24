"""How farnear reads a command line: argparse, with three habits of its own.

A wrong word is a `UserError`, one line, instead of a usage text. Overrides (`section.key=value`) may stand on both
sides of an option. And `--resume` takes the words `auto` and `newest` only, so that an override after it stays one.
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from farnear.errors import UserError
from farnear.run_folder import Resume

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, and keeps the line breaks of examples."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 80),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_run_arguments(parser: argparse.ArgumentParser, *, resumes: bool = True) -> None:
    """A run file, values in its place, and unless ``resumes`` is off how to continue."""
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    if resumes:
        parser.add_argument(
            "--resume",
            metavar="auto",
            nargs="?",
            type=resume,
            help="continue from the newest checkpoint; with auto from the newest whole one, and start if there is none",
        )


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse words; overrides that stand after an option, where argparse takes no more of them, are added to the others.

    Raises:
        UserError: A word is unknown, missing or wrong.
    """
    arguments, remaining = parser.parse_known_args(_with_resume_joined(words))
    for word in remaining:
        if word.startswith("-") and "=" in word:
            raise UserError(f"{word} is not an option; an override is written without dashes: {word.lstrip('-')}")
        if word.startswith("-") or "overrides" not in arguments:
            parser.error(f"{word} is not known here")
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *remaining]
    return arguments


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that name models or shards, and overrides among them. What is there under such a name is no override."""
    overrides = [word for word in words if _OVERRIDE.fullmatch(word) and not Path(word).exists()]
    return [word for word in words if word not in overrides], overrides


def _with_resume_joined(words: Sequence[str]) -> list[str]:
    """Join `--resume auto` to one word, so that `--resume key=value` leaves the override alone."""
    joined: list[str] = []
    for word in words:
        if word == "--resume":
            joined.append("--resume=newest")
        elif word in ("auto", "newest") and joined and joined[-1] == "--resume=newest":
            joined[-1] = f"--resume={word}"
        else:
            joined.append(word)
    return joined


def resume(word: str) -> Resume:
    """How to continue a run."""
    if word == "auto":
        return "auto"
    if word == "newest":
        return "newest"
    raise argparse.ArgumentTypeError(f"'{word}' is not a way to resume; say --resume or --resume auto")


def positive(word: str) -> int:
    """A whole number from 1 on."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number from 1 on")
    return int(word)


def port(word: str) -> int:
    """A TCP port."""
    if not word.isdecimal() or not 1 <= int(word) <= 65535:
        raise argparse.ArgumentTypeError(f"'{word}' is not a port, a number from 1 to 65535")
    return int(word)


def size(word: str) -> tuple[int, int]:
    """Width and height in pixels, written WIDTHxHEIGHT."""
    width, cross, height = word.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"'{word}' is not a size; write WIDTHxHEIGHT, such as 128x160")
    return positive(width), positive(height)
