"""Which column of a table is the query, which the page, and which the hard negatives.

Tables that others publish name their columns in a dozen ways. Where exactly one column has a usual name it is taken,
and told; where none or several have one, nothing is guessed: the message lists all columns with their types.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farnear.errors import UserError

# The first group of names of which a table has one decides: "text" beside a "query" is most often the page's text.
QUERY_NAMES = (("query", "queries", "question", "questions", "anchor"), ("text", "caption"))
PAGE_NAMES = (
    ("image", "page", "page_image", "positive", "pos", "pos_image", "positive_image", "positive_page", "screenshot"),
    ("document", "doc", "passage", "text", "image_path", "image_url", "url"),
)
NEGATIVE_NAME = re.compile(
    r"(?:hard_?)?neg(?:ative)?s?(?:_?(?:image|page|doc|document|passage)s?)?_?\d*", re.IGNORECASE
)


@dataclass(frozen=True)
class Columns:
    """The columns of an import by their names; `unused` are the others."""

    query: str
    page: str
    negatives: tuple[str, ...]
    document: str | None
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"query from {self.query!r}", f"page from {self.page!r}"]
        if self.negatives:
            parts.append(f"hard negatives from {', '.join(map(repr, self.negatives))}")
        if self.document:
            parts.append(f"document from {self.document!r}")
        if self.unused:
            parts.append(f"not used: {', '.join(map(repr, self.unused))}")
        return "columns: " + "; ".join(parts)


def choose_columns(
    features: Mapping[str, Any],
    *,
    query: str | None = None,
    page: str | None = None,
    negatives: Sequence[str] | None = None,
    document: str | None = None,
) -> Columns:
    """Settle the columns of a table.

    Args:
        features: the type of each column, as `datasets` has it.
        query, page, document: names that the user gave; `document` is never guessed.
        negatives: names that the user gave; an empty list for none, None to guess.

    Raises:
        UserError: a given name is not there, or a column cannot be guessed.
    """
    for name in (query, page, document, *(negatives or ())):
        if name is not None and name not in features:
            raise UserError(f"there is no column {name!r}; the columns are {_listed(features)}")
    query = query or _guessed(features, QUERY_NAMES, "query", lambda name: _may_be_query(features[name]))
    page = page or _guessed(features, PAGE_NAMES, "page", lambda name: name != query)
    if negatives is None:
        negatives = sorted(filter(NEGATIVE_NAME.fullmatch, features), key=in_natural_order)
    used = [query, page, *negatives]
    for name in used:
        if used.count(name) > 1:
            raise UserError(f"the column {name!r} is given two parts to play; the columns are {_listed(features)}")
    used.append(document or query)
    return Columns(query, page, tuple(negatives), document, tuple(name for name in features if name not in used))


def in_natural_order(name: str) -> list[tuple[int, str]]:
    """A key to sort by in which `negative_2` comes before `negative_10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _guessed(
    features: Mapping[str, Any], groups: Sequence[Sequence[str]], part: str, fits: Callable[[str], bool]
) -> str:
    for names in groups:
        found = [name for name in features if name.lower() in names and fits(name)]
        if len(found) == 1:
            return found[0]
        if found:
            several = " and ".join(map(repr, found))
            raise UserError(
                f"{several} could all be the {part}, and the wrong one would train a wrong model; name it with "
                f"--{part}-column; the columns are {_listed(features)}"
            )
    raise UserError(
        f"no column has a usual name of the {part} ({', '.join(groups[0])}); name it with --{part}-column; the columns "
        f"are {_listed(features)}"
    )


def _may_be_query(type_: Any) -> bool:
    """A text, or a list of texts."""
    name = type_name(type_)
    return name.removeprefix("list of ") in ("string", "large_string")


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type_name(type_)})" for name, type_ in features.items())


def type_name(type_: Any) -> str:
    """A column's type in a word or a few: `string`, `Image`, `list of Image`."""
    if isinstance(type_, Mapping):
        return "struct of " + ", ".join(type_)
    if isinstance(type_, list):
        return f"list of {type_name(type_[0])}"
    if type(type_).__name__ in ("List", "LargeList"):
        return f"list of {type_name(type_.feature)}"
    dtype = getattr(type_, "dtype", None)
    return str(dtype) if type(type_).__name__ == "Value" else type(type_).__name__
