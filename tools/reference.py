"""The pages that are written from the code: every key of the run file, and every command's help.

    python tools/reference.py keys | commands         prints what the site shows

A key's text is the line under its field; a section's is its docstring. So neither can be out of date.
"""

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from farnear.cli import farnear_parser
from farnear.config import RunConfig
from farnear.sections import Section

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "anything"}


def keys_of_the_run_file() -> str:
    """Markdown: a table of the keys beside the sections, then one for each section."""
    sections = {name: section for name, field in RunConfig.model_fields.items() if (section := _section(field))}
    parts = ["### Beside the sections", *_table(RunConfig, leave_out=sections)]
    for name, section in sections.items():
        texts = ((section.__doc__ or "").split("\n\n")[0], RunConfig.model_fields[name].description or "")
        parts += [f"### {name}", "", " ".join(texts).replace("\n", " "), *_with_those_inside(section, name)]
    return "\n".join(parts)


def help_of_commands() -> str:
    """Markdown: each command's --help under a heading of its own, in the order of `farnear --help`."""
    with _plain_and_eighty_wide():
        return "\n\n".join(
            f"### {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```"
            for parser in _parsers(farnear_parser())
        )


def _with_those_inside(section: type[Section], path: str) -> list[str]:
    """Its table, and those of sections that are its keys or that its keys hold by name."""
    inside: dict[type[Section], list[str]] = {}
    for name, field in section.model_fields.items():
        if one := _section(field):
            inside.setdefault(one, []).append(f"{path}.{name}")
    parts = _table(section)
    for one, paths in inside.items():
        parts += [f"Keys of {', '.join(f'`{inner}`' for inner in paths)}:", *_with_those_inside(one, paths[-1])]
    return parts


def _table(section: type[Section], leave_out: Collection[str] = ()) -> list[str]:
    rows = [
        f"| `{name}` | {_values(field.annotation)} | {_default(field)} | {_escaped(field.description or '')} |"
        for name, field in section.model_fields.items()
        if name not in leave_out
    ]
    return ["", "| key | values | default | |", "|---|---|---|---|", *rows, ""]


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a field is, or of which it holds several by name."""
    kinds = list(_kinds(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _kinds(annotation: Any) -> Iterator[Any]:
    parts = get_args(annotation)
    yield annotation
    for part in parts:
        yield from _kinds(part)


def _values(annotation: Any) -> str:
    """What may stand there, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return _values(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_values(part) for part in parts if part is not NoneType)
    if origin is tuple:
        return f"list of {_values(parts[0])}"
    if origin is dict:
        return f"{_values(parts[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    raise TypeError(f"no words for values of {annotation}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}, ""):
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, tuple):
        value = f"[{', '.join(map(str, value))}]"
    return f"`{value}`"


def _escaped(text: str) -> str:
    """Text of a docstring as a table's cell; what stands in backticks is code already."""
    return "`".join(
        part if place % 2 else re.sub(r"([|*_<\[\]])", r"\\\1", part) for place, part in enumerate(text.split("`"))
    )


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


@contextmanager
def _plain_and_eighty_wide() -> Iterator[None]:
    """argparse looks at the terminal that it happens to be in."""
    before = dict(os.environ)
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


if __name__ == "__main__":
    print({"keys": keys_of_the_run_file, "commands": help_of_commands}[sys.argv[1]]())
