"""What `farnear evaluate` and `farnear compare` print: tables for a terminal."""

from collections.abc import Sequence

from farnear.retrieve.side_by_side import Compared, QueryChange, Subject
from farnear.wording import amount, counted

_IN_TABLE = ("ndcg@10", "recall@1", "recall@10", "mrr@10", "map@100")
_WORDS_OF_A_QUERY = 72


def quality_table(subjects: Sequence[Subject]) -> str:
    """A line for each model, dimension and precision."""
    first = subjects[0].collection
    rows = [["model", "dim", "precision", *_IN_TABLE, "index", "search"]]
    for subject in subjects:
        for one in subject.qualities:
            figures = [f"{one.measures[name]:.4f}" for name in _IN_TABLE]
            cost = [amount(one.index_bytes), _milliseconds(one.search_seconds)]
            rows.append([subject.name, f"{one.dim:,}", one.precision, *figures, *cost])
    task = f"{_queries(len(first.query_ids))} against {counted(len(first.document_ids), 'page')}"
    lines = [task, "", *_aligned(rows), ""]
    for subject in subjects:
        facts = subject.collection.facts
        if "seconds_per_query" in facts and "seconds_per_document" in facts:
            query, page = _milliseconds(facts["seconds_per_query"]), _milliseconds(facts["seconds_per_document"])
            device = facts.get("device", "device not known")
            lines.append(f"{subject.name}: embeds a query that comes alone in {query}, a page in {page} ({device})")
    return "\n".join(lines).rstrip()


def comparison_table(baseline: Subject, compared: Sequence[Compared], measure: str) -> str:
    """The measure at every dimension and precision, and every measure at the first of them."""
    lines = []
    for model in dict.fromkeys(one.model for one in compared):
        of_model = [one for one in compared if one.model == model]
        largest = (of_model[0].dim, of_model[0].precision)
        rows = [["measure", "dim", "precision", baseline.name, model, "change", "95 % interval", "better", "worse"]]
        rows += [_row(one) for one in of_model if one.measure == measure]
        rows += [_row(one) for one in of_model if one.measure != measure and (one.dim, one.precision) == largest]
        lines += [f"{model} against {baseline.name}", "", *_aligned(rows), ""]
    unclear = any(not one.difference.is_clear for one in compared)
    if unclear:
        lines.append("An interval in brackets holds 0: these queries cannot tell the two apart.")
    return "\n".join(lines).rstrip()


def changes_text(model: str, changes: Sequence[QueryChange], measure: str, most: int = 5) -> str:
    """The queries that gained most and those that lost most."""
    better = [one for one in changes if one.change > 0]
    worse = [one for one in reversed(changes) if one.change < 0]
    lines = []
    for word, of_word in (("better", better), ("worse", worse)):
        lines.append(f"{_queries(len(of_word))} {'is' if len(of_word) == 1 else 'are'} {word} with {model} ({measure})")
        lines += _aligned(
            [
                [
                    f"  {one.change:+.3f}",
                    f"rank {one.baseline_rank or '> 100'} -> {one.rank or '> 100'}",
                    _shortened(one.text),
                ]
                for one in of_word[:most]
            ],
            left=(2,),
        )
    return "\n".join(lines)


def _row(one: Compared) -> list[str]:
    difference = one.difference
    interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return [
        one.measure,
        f"{one.dim:,}",
        one.precision,
        f"{one.baseline:.4f}",
        f"{one.value:.4f}",
        f"{difference.mean:+.4f}",
        interval if difference.is_clear else f"({interval})",
        f"{difference.better:,}",
        f"{difference.worse:,}",
    ]


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 2)) -> list[str]:
    """Columns of one width, words to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _queries(count: int) -> str:
    return counted(count, "query", "queries")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _WORDS_OF_A_QUERY else f"{words[: _WORDS_OF_A_QUERY - 1]}…"
