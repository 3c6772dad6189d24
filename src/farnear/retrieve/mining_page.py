"""Some queries with their positives and mined negatives as one HTML page, by which a person judges the negatives.

A look at twenty of them shows what no figure does: whether the nearest pages are hard negatives, or answers that
nobody has marked. The page holds its pictures and loads nothing.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from farnear.data.document_names import DocumentNames, pair_rows
from farnear.data.index import Index, modality_name
from farnear.data.plan import random_bits
from farnear.data.read import InputReader
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError
from farnear.files import replace_text
from farnear.retrieve.thumbnail import SIDE, thumbnail_bytes

EXAMPLES = 20
_TEXT = 300  # characters of a text at most

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>Mined negatives · farnear</title>
<style>
:root { --paper: #fcfbf8; --ink: #22211e; --soft: #6a675f; --rule: #e5e2da; --accent: #2b5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #171716; --ink: #e8e5de; --soft: #9c988e; --rule: #34322e; --accent: #82ade8; }
}
body { margin: 0 auto; max-width: 75rem; padding: 2rem 1.25rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--rule); padding: 1.2rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 11rem; }
figure img { max-width: 100%; max-height: 14rem; border: 1px solid var(--rule); display: block; }
figure.positive img, figure.positive p { outline: 3px solid var(--accent); }
figcaption, .soft { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Mined negatives</h1>
<p class="soft">{{ about }}. Outlined: the pages that answer the query. A negative that answers it too should have been
marked as a positive; a margin or max_score leaves such pages out.</p>
{% for example in examples %}
<section>
<h2>{% if example.image %}<img src="{{ example.image }}" alt="the query">{% else %}{{ example.text }}{% endif %}</h2>
<p class="soft">{{ example.name }}</p>
<div class="row">
{% for page in example.pages %}
<figure class="{{ page.kind }}">
{% if page.image %}<img src="{{ page.image }}" alt="{{ page.name }}">{% else %}<p>{{ page.text }}</p>{% endif %}
<figcaption>{{ page.kind }}{{ page.scores }}<br>{{ page.name }}</figcaption>
</figure>
{% endfor %}
</div>
</section>
{% endfor %}
</body>
</html>
"""


def write_examples(index: Index, store: ShardStore, negatives: Path, page: Path, facts: Mapping[str, Any]) -> None:
    """Write the page: the pairs of a side file that a hash chooses, the same at each mining."""
    reader, names = InputReader(index, store), DocumentNames(index)
    examples = [_example(index, reader, names, line) for line in _chosen(index, negatives)]
    about = f"{len(examples)} of {len(index):,} pairs, by the model {facts.get('model', 'that was given')}"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    replace_text(page, environment.from_string(_PAGE).render(about=about, examples=examples))


def _chosen(index: Index, negatives: Path) -> list[dict[str, Any]]:
    """Lines of pairs. The file is in the order of the index, behind its first line."""
    order = np.argsort(random_bits("examples", np.arange(len(index))), kind="stable")
    wanted = set(order[:EXAMPLES].tolist())
    with open(negatives, encoding="utf-8") as file:
        next(file)
        return [json.loads(line) for pair, line in enumerate(file) if pair in wanted]


def _example(index: Index, reader: InputReader, names: DocumentNames, line: Mapping[str, Any]) -> dict[str, Any]:
    shard, key = (pa.array([line[name]], pa.large_string()) for name in ("shard", "key"))
    (pair,) = pair_rows(index, shard, key).tolist()
    rows = names.rows(pa.array(line["neg_ids"], pa.large_string())).tolist()
    pages = list(_pages(reader, index.positives_of(pair).tolist(), "positive", line, "pos"))
    pages += list(_pages(reader, rows, "negative", line, "neg"))
    return {"name": index.pair_id(pair), "pages": pages, **_shown(reader, int(index.query_N[pair]))}


def _pages(
    reader: InputReader, rows: list[int], kind: str, line: Mapping[str, Any], prefix: str
) -> Iterator[dict[str, Any]]:
    for place, row in enumerate(rows):
        scores = f" {line[f'{prefix}_similarity'][place]:.3f}"
        teacher = line.get(f"{prefix}_teacher")
        if teacher and teacher[place] is not None:
            scores += f", reranker {teacher[place]:.2f}"
        yield {"kind": kind, "scores": scores, "name": reader.index.input_id(row), **_shown(reader, row)}


def _shown(reader: InputReader, row: int) -> dict[str, str]:
    """An input as a picture or a text."""
    try:
        if (picture := reader.picture(row, SIDE)) is not None:
            encoded = base64.b64encode(thumbnail_bytes(picture)).decode()
            return {"image": f"data:image/jpeg;base64,{encoded}", "text": ""}
        words = reader.words(row)
    except UserError as error:
        words = str(error)
    return {"image": "", "text": words[:_TEXT] or modality_name(int(reader.index.input_modality_I[row]))}
