"""A run at one moment as text: a picture for a terminal, or a line for a pipe.

The picture fits the terminal: lines are cut at its width, and where it is low, evaluations by dimension and ranks of
which nothing is wrong are shortened first.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import groupby
from math import isfinite

from farnear.course import duration, is_count, is_number
from farnear.report.following import Rank, View
from farnear.report.tail import Record
from farnear.wording import amount, counted, printable, spans

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"
HEADLINE = "ndcg@10"
_LABEL = 10
_NARROWEST = 20  # narrower ones are cut
_FEWEST_DIMS = 2
_STEPS_OF_LOSS = 10


def picture(view: View, width: int = 80, height: int = 24, *, waits: str | None = None, unicode: bool = True) -> str:
    """All that is known, in at most ``height - 1`` lines of at most ``width`` characters.

    Args:
        waits: What a cluster says of the run's job, where one waits.
    """
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    drawn = max(width, _NARROWEST)
    head = [*_head(view, drawn, waits), *_steps(view, drawn, blocks)]
    tail = [*_saved(view), *_left_out(view)]
    evaluations, ranks = list(_evaluations(view)), list(_ranks(view))
    room = height - 1 - len(head) - len(tail)
    evaluations = _shortened(evaluations, max(min(len(evaluations), _FEWEST_DIMS + 1), room - len(ranks)), "dim")
    ranks = _shortened(ranks, room - len(evaluations), "more")
    lines = [*head, *evaluations, *tail, *ranks][: height - 1]
    return "\n".join(_cut(printable(line), width) for line in lines)


def one_line(view: View, waits: str | None = None) -> str:
    """The same for a log."""
    parts = [_state(view, waits)]
    if view.step is not None:
        parts += [_step(view), f"loss {_loss(view)}", *_speed(view.last), _left(view)]
    elif (place := _place_of_first(view)) and view.state == "running":
        parts.append(place)
    marked = [rank for rank in view.ranks if rank.mark]
    if marked:
        parts.append(f"ranks {spans([rank.number for rank in marked])}: {marked[0].mark}")
    if waits is None:
        parts.append(_why(view))
    return printable("  ".join(filter(None, parts)))


def news(before: View | None, view: View) -> Iterator[str]:
    """Lines on what has been added since the view before: evaluations, checkpoints, minings, steps left out."""
    return map(printable, _news(before, view)) if before is not None else iter(())


def _news(before: View, view: View) -> Iterator[str]:
    for record in _added(before.evaluations, view.evaluations):
        by_dim = "  ".join(f"{dim}: {value:.4f}" for dim, value in _by_dim(record))
        yield f"step {record.get('step')}: nDCG@10 {record.get('kind')} training  {by_dim}"
    for record in _added(before.saves, view.saves):
        yield f"step {record.get('step')}: saved"
    for record in _added(before.minings, view.minings):
        found = record.get("negatives")
        mined = counted(found, "hard negative") if is_count(found) else "hard negatives"
        yield f"step {record.get('step')}: mined {mined}"
    for record in _added(before.bad_steps, view.bad_steps):
        yield f"step {record.get('step')}: {record.get('what')}, {record.get('action')}"


def _head(view: View, width: int, waits: str | None) -> Iterator[str]:
    clock = datetime.now(timezone.utc).strftime("%H:%M:%S UTC")
    yield f"{str(view.folder)[: width - len(clock) - 2]:<{width - len(clock)}}{clock}"
    told = f"{_state(view, waits)}  {_step(view)}".rstrip() + (f"  {_left(view)}" if _left(view) else "")
    for part in filter(None, (told, _why(view) if waits is None else "")):
        yield from textwrap.wrap(part, width, max_lines=3) or [part]


def _state(view: View, waits: str | None) -> str:
    """How the run stands."""
    if waits is not None:
        return f"waiting: {waits}"
    if view.state == "none":
        return "nothing has run yet"
    if view.state == "killed":
        return "killed: its process is gone, and has told nobody why; the same command with --resume auto continues"
    if view.state == "running":
        if view.silent_for is not None and view.silent_for > 30:
            return f"running, but no rank has been heard of for {duration(view.silent_for)}: killed, or cut off"
        return "running" if view.last else "opening"
    return view.state


def _why(view: View) -> str:
    """Why it has ended, where it says so."""
    return " ".join(str(view.reason).split()) if view.has_ended and view.reason else ""


def _step(view: View) -> str:
    if view.step is None:
        return ""
    if view.course is None:
        return f"step {view.step:,}"
    epoch = view.last.get("epoch")
    told = f"  epoch {epoch + 1}/{view.course.epochs}" if is_count(epoch) else ""
    return f"step {view.step:,}/{view.course.total_steps:,}{told}"


def _left(view: View) -> str:
    if view.state != "running" or view.course is None or view.step is None:
        return ""
    return view.pace.left_text(view.course, view.step)


def _steps(view: View, width: int, blocks: str) -> Iterator[str]:
    """Progress, loss and speed."""
    if view.course is not None and view.step is not None:
        room = max(width - 8, 8)
        share = min(view.step / max(view.course.total_steps, 1), 1.0)
        done = int(share * room)
        full, empty = ("█", "░") if blocks is BLOCKS else ("#", ".")
        yield f"{full * done}{empty * (room - done)} {share:6.1%}"
    if not view.last:
        if place := _place_of_first(view):
            yield _line("is at", place)
        return
    loss = f"{_loss(view):<9}"
    room = max(width - _LABEL - 2 - len(loss) - 1, 8)
    yield _line("loss", f"{loss} {sparkline(view.losses, room, blocks)}")
    figures = []
    if is_number(rate := view.last.get("lr")):
        figures.append(f"lr {rate:.2e}")
    if is_number(norm := view.last.get("grad_norm")):
        figures.append(f"grad norm {norm:.3f}")
    yield _line("step", "  ".join([*figures, *_speed(view.last), *_padding(view.recent)]))
    if phases := _phases(view.recent):
        yield _line("time", phases)
    if beside := _beside(view):
        yield _line("beside", beside)


def sparkline(points: Sequence[tuple[int, float]], width: int, blocks: str = BLOCKS) -> str:
    """Values over steps in one line of at most ``width`` characters, each the mean of its part of the steps."""
    points = [(step, value) for step, value in points if isfinite(value)]
    if not points:
        return ""
    first, last = points[0][0], points[-1][0]
    columns: dict[int, list[float]] = {}
    wide = min(width, len(points))
    for step, value in points:
        columns.setdefault((step - first) * wide // (last - first + 1), []).append(value)
    means = [sum(columns[column]) / len(columns[column]) for column in sorted(columns)]
    low, high = min(means), max(means)
    steps = len(blocks) - 1
    return "".join(blocks[round((value - low) / (high - low) * steps) if high > low else 0] for value in means)


def _evaluations(view: View) -> Iterator[str]:
    """The measure by dimension, before and now: of everything, or while there is none else of the sample."""
    first, last = _first_and_last(view.evaluations)
    if last is None:
        return
    now = dict(_by_dim(last))
    before = dict(_by_dim(first)) if first is not None and first is not last else {}
    size = f"{last.get('queries')} queries, {last.get('pages')} pages"
    yield _line(
        "nDCG@10",
        f"at step {last.get('step')} ({size})" + (f"  before at step {first.get('step')}" if before and first else ""),
    )
    for dim, value in now.items():
        was = f"{before[dim]:.4f} -> " if dim in before else ""
        yield _line(dim, f"{was}{value:.4f}")


def _first_and_last(evaluations: Sequence[Record]) -> tuple[Record | None, Record | None]:
    """The newest evaluation, and the oldest that measured the same."""
    known = [record for record in evaluations if list(_by_dim(record))]
    if not known:
        return None, None
    last = known[-1]
    same = [one for one in known if (one.get("queries"), one.get("pages")) == (last.get("queries"), last.get("pages"))]
    return same[0], last


def _by_dim(record: Record) -> Iterable[tuple[str, float]]:
    metrics = record.get("metrics")
    if not isinstance(metrics, dict):
        return []
    found = [(dim, of_dim.get(HEADLINE)) for dim, of_dim in metrics.items() if isinstance(of_dim, dict)]
    return [(dim, value) for dim, value in found if is_number(value)]


def _saved(view: View) -> Iterator[str]:
    if view.checkpoint is None:
        return
    told = view.checkpoint
    if view.saves and is_number(seconds := view.saves[-1].get("seconds")):
        told += f" in {seconds:.1f} s"
    yield _line("saved", told + (f"  best {view.best}" if view.best else ""))


def _left_out(view: View) -> Iterator[str]:
    told = []
    if view.bad_steps:
        last = view.bad_steps[-1]
        told.append(f"{counted(len(view.bad_steps), 'bad step')}, the last is {last.get('step')} ({last.get('what')})")
    if view.quarantined:
        told.append(f"{counted(view.quarantined, 'pair')} in quarantine")
    if told:
        yield _line("left out", "; ".join(told))


def _ranks(view: View) -> Iterator[str]:
    """Ranks that are at the same place in a line, those with a mark first."""

    def shown(rank: Rank) -> tuple[str, str]:
        return rank.mark, rank.place or ""

    grouped = [(key, list(ranks)) for key, ranks in groupby(sorted(view.ranks, key=shown), key=shown)]
    for (mark, place), ranks in sorted(grouped, key=lambda one: (not one[0][0], one[1][0].number)):
        numbers = spans([rank.number for rank in ranks])
        ago = max(rank.seconds_ago for rank in ranks)
        told = ", ".join(filter(None, [place, f"{ago:.0f} s ago" if place else ""]))
        yield _line(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {numbers}",
            f"{'! ' if mark else ''}{mark}{': ' if mark and told else ''}{told}",
        )


def _place_of_first(view: View) -> str:
    return next((rank.place for rank in view.ranks if rank.place), "")


def _phases(records: Sequence[Record]) -> str:
    """Shares of the last steps' time."""
    sums: dict[str, float] = {}
    for record in records:
        phases = record.get("seconds")
        for name, seconds in phases.items() if isinstance(phases, dict) else ():
            if is_number(seconds):
                sums[name] = sums.get(name, 0.0) + seconds
    total = sum(sums.values())
    if not total:
        return ""
    largest_first = sorted(sums.items(), key=lambda one: -one[1])
    each = "  ".join(f"{name.replace('_', ' ')} {seconds / total:.0%}" for name, seconds in largest_first)
    return f"{total / len(records):.2f} s a step: {each}"


def _beside(view: View) -> str:
    """What the run has taken apart from its steps, since its first start."""
    kinds = {
        "evaluations": (view.evaluations, "seconds"),
        "minings": (view.minings, "seconds"),
        "waits for saves": (view.saves, "seconds_waited"),
    }
    sums = {name: sum(filter(is_number, (one.get(key) for one in many))) for name, (many, key) in kinds.items()}
    return "  ".join(f"{name} {duration(seconds)}" for name, seconds in sums.items() if seconds >= 1)


def _padding(records: Sequence[Record]) -> list[str]:
    shares = [share for record in records if is_number(share := record.get("padding_share"))]
    return [f"padding {sum(shares) / len(shares):.0%}"] if shares else []


def _speed(record: Record) -> list[str]:
    told = []
    if is_number(speed := record.get("pairs_per_s")):
        told.append(f"{speed:.1f} pairs/s")
    if is_number(memory := record.get("peak_memory_bytes")):
        told.append(amount(memory))
    return told


def _loss(view: View) -> str:
    """The mean of the last steps, fewer than those of speeds: it moves."""
    losses = [loss for record in view.recent[-_STEPS_OF_LOSS:] if is_number(loss := record.get("loss"))]
    return f"{sum(losses) / len(losses):.4f}" if losses else "none"


def _added(before: Sequence[Record], now: Sequence[Record]) -> Sequence[Record]:
    return now[len(before) :] if len(now) > len(before) else ()


def _shortened(lines: list[str], most: int, what: str) -> list[str]:
    if len(lines) <= most or most < 1:
        return lines[: max(most, 0)]
    hidden = len(lines) - most + 1
    return [
        *lines[: most - 1],
        _line("", f"and {hidden} more" if what == "more" else f"and {counted(hidden, what)} more"),
    ]


def _cut(line: str, width: int) -> str:
    """At most ``width`` characters, without half a figure at the end where there are several."""
    if len(line) <= width:
        return line
    whole = line[: width + 1].rpartition("  ")[0].rstrip()
    return whole if len(whole) > _LABEL + 2 else line[:width]


def _line(label: str, text: str) -> str:
    return f"{label:>{_LABEL}}  {text}"
