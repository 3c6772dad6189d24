"""The table of features, each with the tests that prove it: written in docs/features.md, copied into the README.

    python tools/feature_table.py         copies it; `make docs` does

A group of features is headed by a line with its name in bold alone.
"""

import ast
import os
import re
from pathlib import Path

from markdown_links import local_links, repository_path, without_comments

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "docs/features.md"
COPY = "README.md"
BEGIN = "<!-- The table of docs/features.md; `make docs` copies it. -->"
END = "<!-- End of the table. -->"

_NAMED_TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def table(text: str) -> str:
    """The table of the features' page, as it stands there; lines that wait in a comment are not in it."""
    return "\n".join(line for line in without_comments(text).splitlines() if line.startswith("|"))


def table_for_copy(text: str) -> str:
    """The same with links that lead from the README."""
    rows = table(text)
    for link in reversed(local_links(rows)):
        anchor = f"#{link.anchor}" if link.anchor else ""
        target = os.path.relpath(repository_path(SOURCE, link.path), os.path.dirname(COPY) or ".")
        rows = rows[: link.start] + target + anchor + rows[link.stop :]
    return rows


def with_table(readme: str, rows: str) -> str:
    """The README with these rows between its two marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{COPY} has no '{BEGIN}' followed by '{END}'")
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"


def features(rows: str) -> dict[str, list[tuple[str, str]]]:
    """The tests, as (file, function), of each feature; lines that only head a group are none."""
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.splitlines()[2:]]
    return {name: named_tests(proof) for name, _what, proof in cells if not name.startswith("**")}


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file, function) of every test that a text names as `tests/test_x.py::test_y`."""
    return [(match[1], match[2]) for match in _NAMED_TEST.finditer(text)]


def missing(tests: list[tuple[str, str]], root: Path = ROOT) -> list[str]:
    """Those of them that are no test functions, parametrised or not, of the default suite."""
    there = {file: _tests_in(root / file) for file, _name in tests}
    return [f"{file}::{name}" for file, name in tests if name not in there[file]]


def _tests_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {one.name for one in functions if "pytest.mark.soak" not in map(ast.unparse, one.decorator_list)}


if __name__ == "__main__":
    copy = ROOT / COPY
    copy.write_text(
        with_table(copy.read_text(encoding="utf-8"), table_for_copy((ROOT / SOURCE).read_text(encoding="utf-8"))),
        encoding="utf-8",
    )
