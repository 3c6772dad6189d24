"""The table of features, each with the tests that prove it: written in docs/features.md, copied into the README.

    python tools/feature_table.py         copies it; `make docs` does
"""

import ast
import os
import re
from pathlib import Path

from markdown_links import local_links, repository_path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "docs/features.md"
COPY = "README.md"
BEGIN = "<!-- The table of docs/features.md; `make docs` copies it. -->"
END = "<!-- End of the table. -->"

_PROOF = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def table(text: str) -> str:
    """The table of the features' page, as it stands there."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return "\n".join(rows)


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


def features(rows: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(feature, its tests as (file, function)) of each row; lines that only head a group are none."""
    found = []
    for row in rows.splitlines()[2:]:
        name, _what, proof = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        if not name.startswith("**"):
            found.append((name, _PROOF.findall(proof)))
    return found


def tests_in(path: Path) -> set[str]:
    """Names of the test functions of a file, parametrised or not."""
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def without_proof(rows: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the rows' tests, a line each."""
    wrong = [f"{name}: no test" for name, proofs in features(rows) if not proofs]
    for name, proofs in features(rows):
        wrong += [f"{name}: no {file}::{test}" for file, test in proofs if test not in tests_in(root / file)]
    return wrong


if __name__ == "__main__":
    copy = ROOT / COPY
    copy.write_text(
        with_table(copy.read_text(encoding="utf-8"), table_for_copy((ROOT / SOURCE).read_text(encoding="utf-8"))),
        encoding="utf-8",
    )
