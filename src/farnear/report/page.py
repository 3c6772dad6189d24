"""The report: a run folder as one HTML page.

``write_report`` reads what the run has written (``records``), has each part of the page say its piece (``sections``,
drawn with ``figures`` and ``bars``) and fills ``template.html`` with the result. The template alone decides how things
look and in which order they come. jinja2 escapes every value, and the page forbids itself to load anything.
"""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from farnear.files import replace_text
from farnear.report import sections
from farnear.report.records import Run, read_run
from farnear.run_folder import RunFolder


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the run folder, complete or not at all, and return its path.

    Reads ``run.yaml``, ``metrics.jsonl``, ``eval.jsonl``, ``faults.jsonl``, ``quarantine.jsonl`` and ``summary.json``;
    all but the first may be missing.
    Raises UserError for a folder that is no run and for a damaged file, by name and line.
    """
    report = RunFolder(run_folder).report
    replace_text(report, render(read_run(run_folder)))
    return report


def render(run: Run) -> str:
    """The page of a run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("farnear.report").joinpath("template.html").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        tiles=sections.tiles(run),
        change=sections.change(run.evaluations),
        ndcg_chart=sections.ndcg_chart(run.evaluations),
        measures=sections.measures(run.evaluations),
        training_charts=sections.training_charts(run.steps),
        time=sections.time_by_phase(run.steps),
        masked=sections.masked_pairs(run.steps),
        left_out=sections.left_out(run),
        summary=[(key, sections.plain(value)) for key, value in run.summary.items()],
    )
