"""The documentation: a site that loads nothing from elsewhere, links that lead somewhere, words that the code knows."""

import html
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from feature_table import COPY, SOURCE, features, missing, named_tests, table, table_for_copy, with_table
from markdown_links import anchor_of, broken_links, local_links
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_site
from mkdocs.exceptions import Abort
from reference import help_of_commands, keys_of_the_run_file

from farnear.cli import farnear_parser
from farnear.command_line import parse
from farnear.config import parse_config
from farnear.errors import UserError
from farnear.flywheel_file import read_flywheel
from farnear.sections import Section

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md")
WRITTEN = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in ROOT.glob(place))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a warning would have ended that."""
    folder = tmp_path_factory.mktemp("site")
    build(load_site(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.fixture
def build_small(tmp_path: Path) -> Callable[..., Path]:
    """Builds a repository of some files by the settings of this one; every page is in the navigation."""

    def build_of(files: dict[str, str], nav: list[str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        own = {"INHERIT": str(ROOT / "mkdocs.yml"), "hooks": [str(ROOT / "tools" / "docs_site.py")], "nav": nav}
        (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(own))
        build(load_site(str(tmp_path / "mkdocs.yml")))
        return tmp_path / "site"

    return build_of


def text_of(page: Path) -> str:
    """What a page shows, white space folded."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


# The site


class Loaded(HTMLParser):
    """Addresses of what a page loads by itself: all but what a reader has to click."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.addresses += [value for name, value in attrs if value and name in ("src", "href", "srcset", "data")]


def elsewhere(page: str) -> list[str]:
    loaded = Loaded()
    loaded.feed(page)
    return [address for address in loaded.addresses if re.match(r"(\w+:)?//", address)]


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "features.html", "repository/CONTRIBUTING.html"} <= {str(p.relative_to(site)) for p in pages}
    for page in pages:
        assert elsewhere(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_what_a_page_loads_is_seen() -> None:
    page = '<a href="https://a"></a><script src="https://b"></script><link href="//c"><img src="d.png">'
    assert elsewhere(page) == ["https://b", "//c"]


def test_a_link_into_the_repository_works_in_the_site(build_small: Callable[..., Path]) -> None:
    site = build_small(
        {
            "docs/index.md": "# Home\n\n[code](../src/a.py) [figures](../figures/RESULTS.md#a---b) `[no](link.md)`\n",
            "docs/deep/page.md": "# Page\n\n[home](../index.md) [code](../../src/a.py)\n",
            "src/a.py": "print('a')\n",
            "figures/RESULTS.md": "# Figures\n\n## A - B\n\n[page](../docs/deep/page.md) [more](more.txt)\n",
            "figures/more.txt": "more\n",
        },
        ["index.md", "deep/page.md"],
    )
    assert (site / "repository/src/a.py").read_text() == "print('a')\n"
    assert (site / "repository/figures/more.txt").read_text() == "more\n"
    assert 'href="repository/src/a.py"' in (site / "index.html").read_text()
    assert 'href="repository/figures/RESULTS.html#a---b"' in (site / "index.html").read_text()
    assert 'href="../repository/src/a.py"' in (site / "deep/page.html").read_text()
    results = (site / "repository/figures/RESULTS.html").read_text()
    assert 'href="../../deep/page.html"' in results and 'id="a---b"' in results


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[x](missing.md)", "missing.md"),
        ("[x](#nowhere)", "nowhere"),
        ("[x](other.md#nowhere)", "nowhere"),
        ("[x](../src/missing.py)", "src/missing.py"),
        ("![x](missing.png)", "missing.png"),
        ("[x](/other.md)", "/other.md"),
    ],
)
def test_a_dead_link_ends_the_build(
    build_small: Callable[..., Path], text: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Abort):
        build_small({"docs/index.md": f"# Home\n\n{text}\n", "docs/other.md": "# Other\n"}, ["index.md", "other.md"])
    assert named in caplog.text


def test_a_page_that_the_navigation_lacks_ends_the_build(build_small: Callable[..., Path]) -> None:
    with pytest.raises(Abort):
        build_small({"docs/index.md": "# Home\n", "docs/other.md": "# Other\n"}, ["index.md"])


def test_every_key_is_on_its_page_with_its_line(site: Path) -> None:
    page, text = (site / "run-file.html").read_text(), text_of(site / "run-file.html")
    fields = [item for section in Section.__subclasses__() for item in section.model_fields.items()]
    assert len(fields) > 100
    for name, field in fields:
        assert f"<code>{name}</code>" in page or f'id="{name}"' in page, name  # a row, or the heading of a section
        assert (field.description or "").replace("`", "") in text, name
    assert "| `bf16` | true, false | `false` |" in keys_of_the_run_file()


def test_every_command_is_on_its_page(site: Path) -> None:
    text = text_of(site / "commands.html")
    for words in ("farnear shards queries import", "farnear compare", "--write-exclude", "--gpus-per-node"):
        assert words in text
    headings = re.findall(r"^### (.+)$", help_of_commands(), re.MULTILINE)
    assert len(headings) == len(set(headings)) > 20


# The files as they are read in the repository


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT, page) == []


def test_dead_links_and_anchors_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "b.md").write_text("# The `one` heading: of two\n\n```\n# no heading\n```\n")
    (tmp_path / "docs" / "a.md").write_text(
        "[ok](b.md#the-one-heading-of-two) [ok](https://a/b) [over\ntwo lines](b.md) `[code](x.md)`\n"
        "[dead](c.md) ![dead](../c.png)\n"
        "[dead](b.md#no-heading) [dead](#here) [dead](../../out.md) [dead](/docs/b.md)\n"
        '<img src="d.png"> <!-- [comment](e.md) -->\n\n```\n[code](x.md)\n```\n'
    )
    assert [line.split(": ", 1) for line in broken_links(tmp_path, "docs/a.md")] == [
        ["docs/a.md:3", "c.md: there is no file docs/c.md"],
        ["docs/a.md:3", "../c.png: there is no file c.png"],
        ["docs/a.md:4", "b.md#no-heading: docs/b.md has no heading #no-heading"],
        ["docs/a.md:4", "#here: docs/a.md has no heading #here"],
        ["docs/a.md:4", "../../out.md: leads out of the repository"],
        ["docs/a.md:4", "/docs/b.md: a path is written relative to its file"],
        ["docs/a.md:5", "d.png: there is no file docs/d.png"],
    ]
    assert anchor_of("One GPU: gpu_step.py") == "one-gpu-gpu_steppy"
    assert [link.target for link in local_links("[![x](a.png)](b.md)")] == ["a.png", "b.md"]


# The table of features


def test_the_readme_has_the_table_of_features() -> None:
    rows = table_for_copy((ROOT / SOURCE).read_text())
    readme = (ROOT / COPY).read_text()
    assert readme == with_table(readme, rows), "run `make docs`, which copies the table of docs/features.md"
    assert "](docs/batch.md)" in rows and "](docs/losses.md#a-loss-of-your-own)" in rows


def test_every_feature_names_a_test() -> None:
    by_feature = features(table((ROOT / SOURCE).read_text()))
    assert len(by_feature) > 40
    assert [name for name, tests in by_feature.items() if not tests] == []


@pytest.mark.parametrize("page", WRITTEN)
def test_every_named_test_is_there(page: str) -> None:
    assert missing(named_tests((ROOT / page).read_text())) == []


def test_a_feature_without_a_test_and_a_test_that_is_not_there_are_seen(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "@pytest.mark.parametrize('x', [1])\ndef test_is_there(x): ...\n\ndef helper(): ...\n\n"
        "@pytest.mark.soak\ndef test_of_minutes(): ...\n"
    )
    rows = (
        "| feature | what | proof |\n|---|---|---|\n| **Group** | | |\n| none | x | |\n"
        "| some | a \\| b | `tests/test_a.py::test_is_there`<br>`tests/test_a.py::test_is_not` |\n"
        "| other | x | `tests/test_a.py::helper` `tests/test_a.py::test_of_minutes` `tests/test_b.py::test_is_there` |"
    )
    by_feature = features(rows)
    assert list(by_feature) == ["none", "some", "other"] and by_feature["none"] == []
    assert missing([test for tests in by_feature.values() for test in tests], tmp_path) == [
        "tests/test_a.py::test_is_not",
        "tests/test_a.py::helper",
        "tests/test_a.py::test_of_minutes",
        "tests/test_b.py::test_is_there",
    ]
    assert table(f"<!--\n| waits | x | y |\n-->\n{rows}") == rows


# Commands and keys that the pages show


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [m[2] for m in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if m[1] in languages]


def commands_of(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(\w+=\S+ )*farnear ", line)]
    return [one[one.index("farnear") + 1 :] for one in words]


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_have_these_words(page: str) -> None:
    for block in blocks(page, "", "bash"):
        for words in commands_of(block):
            parse(farnear_parser(), words)


def test_a_command_with_other_words_is_seen() -> None:
    [good, bad] = commands_of(
        "A=1 farnear plan run.yaml \\\n  --gpu h100  # why\nmake demo\nfarnear plan run.yaml --card l4\n"
    )
    parse(farnear_parser(), good)
    with pytest.raises(UserError, match="--card is not known here"):
        parse(farnear_parser(), bad)


def parse_block(block: str, folder: Path, *, reranker: bool) -> None:
    """Validate a piece of a run file, put over the least that a run file has."""
    tree: dict[str, Any] = yaml.safe_load(block)
    if "stages" in tree:
        (folder / "flywheel.yaml").write_text(block)
        read_flywheel(folder / "flywheel.yaml")
        return
    data = {"train": "train-*.tar", "eval": "eval-*.tar", **tree.get("data", {})}
    if "sources" in data:
        del data["train"]
    model = tree.get("model", {})
    if "router" not in model:  # it takes the place of a name
        model = {"name_or_path": "m", **model}
    parse_config({"output_dir": "run", "reranker": {} if reranker else None, **tree, "model": model, "data": data})


@pytest.mark.parametrize("page", WRITTEN)
def test_pieces_of_run_files_are_valid(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        parse_block(block, tmp_path, reranker=page == "docs/reranker.md")


def test_a_piece_with_another_key_is_seen(tmp_path: Path) -> None:
    parse_block("training: {keep_graphs: auto}", tmp_path, reranker=False)
    with pytest.raises(UserError, match=r"did you mean 'training\.keep_graphs'"):
        parse_block("training: {keep_graph: auto}", tmp_path, reranker=False)
