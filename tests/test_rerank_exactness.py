"""A slice of benchmarks/exactness_reranker.py: the gradient of a reranker's step is the plain one."""

import exactness_reranker
import pytest
from exactness import BOUND_FP32


def test_the_gradient_is_the_plain_one() -> None:
    results = exactness_reranker.run((1, 2), small=True)
    expected = {(w, case) for w, cases in exactness_reranker.SLICE.items() for case in cases}
    assert {(row["world_size"], row["case"]) for row in results} == expected
    assert max(row["error"] for row in results) <= BOUND_FP32
    summary = exactness_reranker.summarise(results)
    assert exactness_reranker.is_good(summary)
    # FSDP2 pads rows that no number of ranks divides.
    assert summary["reductions_per_step"] == pytest.approx(dict.fromkeys(exactness_reranker.STRATEGIES, 1.0), abs=0.01)
