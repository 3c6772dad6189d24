"""The first column of benchmarks/precision.py: what each precision may cost under each strategy."""

import precision
import pytest


def test_each_precision_keeps_its_bound() -> None:
    rows = precision.run((8,))
    assert {(row["strategy"], row["precision"]) for row in rows} == {
        (strategy, kind) for strategy in precision.STRATEGIES for kind in precision.BOUNDS
    }
    for row in rows:
        assert row["error"] <= precision.BOUNDS[row["precision"]], row
    # A strategy has no precision of its own.
    for kind in ("bf16", "fp16"):
        errors = [row["error"] for row in rows if row["precision"] == kind]
        assert errors == pytest.approx([errors[0]] * len(errors), rel=0.05)
        assert min(errors) > 10 * precision.BOUNDS["fp32"]
