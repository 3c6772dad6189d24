"""Which lines on a terminal are farnear's own: any other is a library's noise."""

import re
from collections.abc import Iterable

_LABELS = "model|reads|pages|trains|pairs|inputs|batch|cache|loss|duplicates|order|steps|saves|evaluates|mines|licence"
_OWN = re.compile(
    r"|".join(
        (
            r"",
            r"on (no GPU|\d+ x ).*: \d+ ranks?",
            r"\S*accelerate launch --config_file .*",
            rf" *({_LABELS})  \S.*",
            r"step \d+/\d+(  |: )\S.*",
            r"continuing from step-.*",
            r"nDCG@10 .*",
            r"saved .*/checkpoints/step-\d{8}(, the best so far)?",
            r"exported .*",
            r"report .*report\.html",
            r"SIG\w+ at rank \d+: saving step \d+, then stopping",
            r"farnear: .*",
            # the demo
            r"drawing \d+ training and \d+ evaluation pages",
            r" +dimension  before   after",
            r" +\d+ +[01]\.\d{3} +[01]\.\d{3}",
            r"the model is in \S+; which of three unseen pages answers a query\? The first one:",
            r"    (from|model|print).*",
        )
    )
)


def noise(lines: Iterable[str]) -> list[str]:
    """The lines that are not farnear's."""
    return [line for line in lines if not _OWN.fullmatch(line)]
