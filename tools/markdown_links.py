"""Links of the repository's Markdown files, as a git host reads them: relative to the file that they stand in.

The site has the same links (`docs_site` sees to that), so a link that leads nowhere here leads nowhere there.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

_FENCED = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\]\(\s*([^)\s]+)(?:\s+\"[^\"]*\")?\s*\)|\b(?:href|src)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Link:
    """A link that stands in a text.

    Attributes:
        target: As it is written.
        start, stop: Where the target stands in the text.
    """

    target: str
    start: int
    stop: int

    @property
    def path(self) -> str:
        """The part before the anchor; empty for a place on the same page."""
        return self.target.partition("#")[0]

    @property
    def anchor(self) -> str:
        """The part after it; empty where there is none."""
        return self.target.partition("#")[2]


def local_links(text: str) -> list[Link]:
    """Links and pictures of a Markdown text that are files or places, not addresses; those in code are none."""
    found = []
    for match in _LINK.finditer(_blanked(text, _FENCED, _COMMENT, _CODE)):
        group = 1 if match[1] is not None else 2
        link = Link(match[group], match.start(group), match.end(group))
        if not re.match(r"[a-z][a-z0-9+.-]*:", link.target):
            found.append(link)
    return found


def repository_path(page: str, target: str) -> str:
    """The path inside the repository that a link's path leads to, from a page that stands at ``page``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page


def without_comments(text: str) -> str:
    """The text without what only its writers see; comments in code stay."""
    for match in reversed(list(_COMMENT.finditer(_blanked(text, _FENCED, _CODE)))):
        text = text[: match.start()] + text[match.end() :]
    return text


def anchor_of(heading: str, separator: str = "-") -> str:
    """The anchor that git hosts give a heading. Has the form that Python-Markdown's ``slugify`` wants."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> set[str]:
    """Anchors of a Markdown text's headings."""
    headings = (match[1] for match in _HEADING.finditer(_blanked(text, _FENCED, _COMMENT)))
    return {anchor_of(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


def broken_links(root: Path, page: str) -> list[str]:
    """What is wrong with the links of one file, a line each.

    Args:
        root: The repository.
        page: Path of a Markdown file inside it.
    """
    text = (root / page).read_text(encoding="utf-8")
    return [
        f"{page}:{text.count(chr(10), 0, link.start) + 1}: {link.target}: {wrong}"
        for link in local_links(text)
        if (wrong := _what_is_wrong(root, page, link))
    ]


def _what_is_wrong(root: Path, page: str, link: Link) -> str | None:
    if link.path.startswith("/"):
        return "a path is written relative to its file"
    path = repository_path(page, link.path)
    if path.startswith("../"):
        return "leads out of the repository"
    if not (root / path).is_file():
        return f"there is no file {path}"
    if link.anchor and (
        not path.endswith(".md") or link.anchor not in anchors((root / path).read_text(encoding="utf-8"))
    ):
        return f"{path} has no heading #{link.anchor}"
    return None


def _blanked(text: str, *patterns: re.Pattern[str]) -> str:
    """The text with blanks in place of what the patterns find, as long as before."""
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text
