"""The report: a run folder as one HTML page.

``write_report`` reads what the run has written (``records``, ``gallery``), has each part of the page say its piece
(``sections``, ``queries``, ``data_sections``, drawn with ``figures`` and ``bars``) and fills ``template.html`` with the
result. The templates alone decide how things look and in which order they come. jinja2 escapes every value. The page
forbids itself to load anything, and to run anything but the one script that it brings, which is known by its hash.
"""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from farnear.files import replace_text
from farnear.report import data_sections, sections
from farnear.report.queries import queries
from farnear.report.records import Run, read_run
from farnear.run_folder import RunFolder


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the run folder, complete or not at all, and return its path.

    Reads ``run.yaml``, ``metrics.jsonl``, ``eval.jsonl``, ``mined.jsonl``, ``faults.jsonl``, ``quarantine.jsonl``,
    ``summary.json``, ``status.json`` and ``gallery/``; all but the first may be missing.
    Raises UserError for a folder that is no run and for a damaged file, by name and line.
    """
    report = RunFolder(run_folder).report
    replace_text(report, render(read_run(run_folder)))
    return report


def render(run: Run) -> str:
    """The page of a run."""
    environment = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = _file("queries.js")
    return environment.get_template("template.html").render(
        run=run,
        state=sections.state(run),
        tiles=sections.tiles(run),
        change=sections.change(run.evaluations),
        ndcg_chart=sections.ndcg_chart(run.evaluations),
        measures=sections.measures(run.evaluations),
        queries=queries(run.gallery),
        # No value of the run is in it, so it cannot be escaped wrongly, and its hash is always the same.
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        training_charts=sections.training_charts(run.steps),
        time=data_sections.time_by_phase(run.steps),
        data_charts=data_sections.data_charts(run.steps),
        minings=data_sections.minings(run.minings),
        left_out=data_sections.left_out(run),
        summary=[(key, sections.plain(value)) for key, value in run.summary.items()],
    )


def _file(name: str) -> str:
    return files("farnear.report").joinpath(name).read_text(encoding="utf-8")
