"""Turns a model's answers into pairs, and says what became of every query in them.

An answer is asked to be JSON, and often is JSON in a fence, after some words, or a plain list with a query a line. All
of these are read. What starts like JSON and is none was cut off; nothing is made up from it.

Four kinds of query are worse than none and are dropped:

- empty ones;
- refusals: "I'm sorry, I can't help with that." is no query (the usual English ones are known; one in other words that
  comes with several pages is a duplicate);
- duplicates, compared by their words alone. Of several on one page one is kept. One that was written for two pages is
  dropped from both: it does not tell them apart, and as a training pair it would call a right page wrong;
- copied ones, whose words stand in a row on the page: they can be found by matching strings, which is not what a model
  of page images has to learn. For that the page's text has to be known: `farnear shards from-pdf --no-queries` stores
  it beside each page, and for other pages a file of texts can be given.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.ingest.csv_file import read_rows
from farnear.ingest.images import fault_of
from farnear.ingest.pages import StoredPage, list_pages
from farnear.ingest.query_sending import is_answer, read_lines
from farnear.ingest.shards import EVAL, TRAIN, ImportReport, Pair, import_pairs, key_for, refuse_existing_shards
from farnear.ingest.split import Record

_FENCE = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_BULLET = re.compile(r"^(?:[-*\u2022]\s+|\(?\d{1,3}[.):]\s+)")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u201e": "\u201c"}
_REFUSAL = re.compile(
    r"\W*(unfortunately\W+)?((i am |i'm )?(very |so |really )?sorry\b|i apologi[sz]e\b|as an ai\b"
    r"|i( am|'m) (unable|not able) to\b"
    r"|i (cannot|can't|can not|won't|will not) "
    r"(assist|help|comply|fulfil|fulfill|provide|generate|create|write|see|view|read|process|identify|extract)\b)",
    re.IGNORECASE,
)
# Chinese and Japanese put no spaces between words: there each character counts as a word.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")


def import_answers(
    shards: Sequence[Path],
    answers: Sequence[Path],
    out: Path,
    *,
    texts: Path | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    pairs_per_shard: int = 1000,
) -> ImportReport:
    """Write each page that has usable queries as a pair with all of them.

    With several documents each stays on one side of the split; without, or with a single one, each page is a document.

    Args:
        shards: the corpus shards that the requests were made from.
        answers: batch output of OpenAI's form, or what `farnear shards queries run` wrote.
        out: the folder for `train-*.tar` and `eval-*.tar`.
        texts: a CSV or JSON lines with the columns `page` (SHARD.tar/KEY) and `text`: what stands on the pages.
        eval_fraction: share of the pairs (pages) to keep for evaluation; 0 for none.

    Raises:
        UserError: a file is not what it should be, no query remains, or see `farnear.ingest.shards`.
    """
    refuse_existing_shards(out, (TRAIN, EVAL))
    pages = {page.name: page for page in list_pages(shards)}
    text_of_page = {name: page.text for name, page in pages.items() if page.text is not None}
    left_out: Counter[str] = Counter()
    if texts is not None:
        given = _texts(texts)
        left_out["texts of pages that are not in the shards"] += len(given.keys() - pages.keys())
        text_of_page |= {name: text for name, text in given.items() if name in pages}
    queries_of_page, answered = _answered(answers, pages, left_out)
    asked = sum(map(len, queries_of_page.values()))
    kept = choose(queries_of_page, text_of_page, left_out)
    if not kept:
        reasons = "; ".join(_told(left_out)) or "there are no answers"
        raise UserError(f"no query of {asked} remains for {len(pages)} pages ({reasons}); look at the answers")
    left_out["pages with answers but without a query that could be kept"] += len(queries_of_page.keys() - kept.keys())
    left_out["pages without an answer"] += len(pages.keys() - answered)
    documents = {pages[name].document for name in kept}
    records, page_of_key = [], {}
    for number, (name, page) in enumerate(pages.items()):
        if name in kept:
            key = key_for(number, page.key)
            document = page.document if len(documents) > 1 else None
            records.append(Record(key, tuple(kept[name]), document or name))
            page_of_key[key] = page
    unchecked = len(kept.keys() - text_of_page.keys())
    notes = [f"{sum(map(len, kept.values()))} of {asked} queries kept, for {len(kept)} of {len(pages)} pages"]
    if unchecked:
        notes.append(f"{unchecked} pages have no known text, so copied queries were not looked for there; see --texts")
    report = import_pairs(
        records,
        partial(_loaded, page_of_key=page_of_key),
        out,
        eval_fraction=eval_fraction,
        seed=seed,
        pairs_per_shard=pairs_per_shard,
        skipped=_told(left_out),
        notes=notes,
    )
    return report


def choose(
    queries_of_page: Mapping[str, Sequence[str]], text_of_page: Mapping[str, str], left_out: Counter[str]
) -> dict[str, list[str]]:
    """The queries to keep; those dropped are added to `left_out` by reason."""
    pages_with_query: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, queries in queries_of_page.items():
        for query in queries:
            pages_with_query[words_of(query)].add(name)
    kept: dict[str, list[str]] = {}
    for name, queries in queries_of_page.items():
        text = f" {' '.join(words_of(text_of_page.get(name, '')))} "
        seen: set[tuple[str, ...]] = set()
        for query in queries:
            words = words_of(query)
            if not words:
                left_out["queries: empty"] += 1
            elif _REFUSAL.match(query.replace("\u2019", "'")):
                left_out["queries: refusals"] += 1
            elif len(pages_with_query[words]) > 1:
                left_out["queries: duplicates, written for several pages"] += 1
            elif words in seen:
                left_out["queries: duplicates on one page"] += 1
            elif f" {' '.join(words)} " in text:
                left_out["queries: copied from the page's text"] += 1
            else:
                kept.setdefault(name, []).append(query)
            seen.add(words)
    return kept


def words_of(text: str) -> tuple[str, ...]:
    """What a text says without case, punctuation and white space; by this queries are the same or copied."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def parse_answer(content: str) -> list[str] | None:
    """The queries in what a model wrote, as they stand there; None when it cannot be understood."""
    text = _THOUGHTS.sub("", content).strip()
    if fenced := _FENCE.search(text):
        text = fenced[1].strip()
    for start in (match.start() for match in re.finditer(r"[\[{]", text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            if error.pos == len(text) or error.msg.startswith("Unterminated"):
                return None
            continue
        if (queries := _queries_in(value)) is not None:
            return queries
    if text.startswith(("[", "{", "```")):
        return None
    lines = (_BULLET.sub("", line.strip()) for line in text.splitlines())
    return [_unquoted(line) for line in lines if line and not line.endswith((":", "\uff1a"))]


def _queries_in(value: Any) -> list[str] | None:
    """`["a", ...]`, `[{"query": "a"}, ...]`, `{"queries": ...}` or `{"query": "a"}`; None for any other JSON."""
    if isinstance(value, dict):
        for name in ("queries", "query", "questions", "question"):
            if name in value:
                inner = value[name]
                return [inner] if isinstance(inner, str) else _queries_in(inner) if isinstance(inner, list) else None
        return None
    if not isinstance(value, list):
        return None
    found: list[str] = []
    for item in value:
        if isinstance(item, dict):
            item = next((item[name] for name in ("query", "question", "text") if name in item), None)
        if not isinstance(item, str):
            return None
        found.append(item)
    return [query.strip() for query in found]


def _unquoted(line: str) -> str:
    if len(line) > 1 and _QUOTES.get(line[0]) == line[-1]:
        line = line[1:-1]
    return line.strip()


def _answered(
    answers: Sequence[Path], pages: Mapping[str, StoredPage], left_out: Counter[str]
) -> tuple[dict[str, list[str]], set[str]]:
    """All queries written for each page, several answers for one page together; and all pages that were asked for."""
    queries_of_page: dict[str, list[str]] = {}
    failed: set[str] = set()
    answered: set[str] = set()
    for path in answers:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
        for line in read_lines(path, data):
            name = line["custom_id"]
            answered.add(name)
            if name not in pages:
                left_out["answers for pages that are not in the shards"] += 1
            elif not is_answer(line):
                failed.add(name)
            elif (queries := parse_answer(_content(line))) is None:
                left_out["answers that are neither JSON nor lines of queries"] += 1
            else:
                queries_of_page.setdefault(name, []).extend(queries)
    left_out["pages whose requests failed"] += len(failed - queries_of_page.keys())
    return queries_of_page, answered


def _content(line: Mapping[str, Any]) -> str:
    """What the model wrote; the empty text where it wrote nothing or refused."""
    try:
        content = line["response"]["body"]["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    if isinstance(content, list):  # parts, of which some are texts
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _texts(path: Path) -> dict[str, str]:
    if path.suffix.lower() == ".csv":
        _, rows = read_rows(path, required=("page", "text"))
        return {row["page"]: row["text"] for _, row in rows}
    texts: dict[str, str] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            record = json.loads(line)
            if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("page", "text")):
                raise UserError(f'{path} line {number} is not like {{"page": "SHARD.tar/KEY", "text": "..."}}')
            texts[record["page"]] = record["text"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as lines of JSON ({error}); give a .csv or a .jsonl file") from error
    return texts


def _told(left_out: Counter[str]) -> list[str]:
    return [f"{count} {reason}" for reason, count in sorted(left_out.items()) if count]


def _loaded(records: Iterable[Record], page_of_key: Mapping[str, StoredPage]) -> Iterator[Pair]:
    for record in records:
        page = page_of_key[record.key]
        data = page.read()
        if fault := fault_of(data):
            raise UserError(f"the page {page.name} is a file {fault}, so nobody can see it; write its shard again")
        yield Pair(record.key, record.query, data, page.extension, record.document)
