"""What MkDocs does not do by itself: the hooks that mkdocs.yml names.

Pages are written to be read in the repository too. So their links are the repository's, ``../src/farnear/config.py``
among them; each file that is linked is put into the site as it is, under ``repository/``, and the link is turned
there. Markdown files, CONTRIBUTING.md for one, become pages. A file that is not there is found by MkDocs, as any dead
link is. Anchors are those that git hosts give.

Two pages have a mark in the place of what is written from the code (`reference`).
"""

import posixpath
from collections.abc import Callable
from pathlib import Path

from markdown_links import anchor_of, local_links, repository_path, without_comments
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from reference import help_of_commands, keys_of_the_run_file

_OUTSIDE = "repository"
# Pages in the site that no other page has to link.
_PAGES_OUTSIDE = ("CONTRIBUTING.md",)
_WRITTEN_FROM_CODE: dict[str, tuple[str, Callable[[], str]]] = {
    "run-file.md": ("<!-- Every key, written from the code when the site is built. -->", keys_of_the_run_file),
    "commands.md": ("<!-- Every command, written from the code when the site is built. -->", help_of_commands),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors of git hosts."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor_of
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link outside of the docs, and what that links in turn."""
    root, docs = _root(config), _docs(config)
    waiting = [f"{docs}/{file.src_uri}" for file in files.documentation_pages()]
    waiting += [path for path in _PAGES_OUTSIDE if (root / path).is_file()]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith(f"{docs}/") and (root / path).is_file():
            file = File.generated(config, _site_path(docs, path), abs_src_path=str(root / path))
            file.inclusion = InclusionLevel.NOT_IN_NAV  # it need not be there
            files.append(file)
        if path.endswith(".md") and (root / path).is_file():
            text = (root / path).read_text(encoding="utf-8")
            linked = [repository_path(path, link.path) for link in local_links(text)]
            waiting += [one for one in linked if not one.startswith(("/", "../"))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is written from the code, and turn the links to files outside of the docs."""
    if written := _WRITTEN_FROM_CODE.get(page.file.src_uri):
        mark, write = written
        if mark not in markdown:
            raise PluginError(f"{page.file.src_uri} has no line '{mark}'")
        markdown = markdown.replace(mark, write())
    markdown = without_comments(markdown)
    docs, here = _docs(config), page.file.src_uri
    path = here.removeprefix(f"{_OUTSIDE}/") if here.startswith(f"{_OUTSIDE}/") else f"{docs}/{here}"
    if path == "README.md":  # its table is another page's
        page.meta["search"] = {"exclude": True}
    for link in reversed(local_links(markdown)):
        if not link.path or link.path.startswith("/"):
            continue
        target = _site_path(docs, repository_path(path, link.path))
        turned = posixpath.relpath(target, posixpath.dirname(here) or ".") + link.target[len(link.path) :]
        markdown = markdown[: link.start] + turned + markdown[link.stop :]
    return markdown


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _docs(config: MkDocsConfig) -> str:
    return Path(config.docs_dir).relative_to(_root(config)).as_posix()


def _site_path(docs: str, path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    return path.removeprefix(f"{docs}/") if path.startswith(f"{docs}/") else f"{_OUTSIDE}/{path}"
