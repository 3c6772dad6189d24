"""Damaged tars: a slice of the fuzzer's cases here, ten thousand of them in `make soak`."""

from pathlib import Path

import pytest
from tar_fuzz import Counts, fuzz

SLICE = range(500)
SOAK = range(1_000, 13_000)


def check(counts: Counts, cases: int) -> None:
    assert (counts.silent, counts.crashes, counts.hangs) == (0, 0, 0), "\n".join(counts.failures[:10])
    assert counts.cases == cases
    # Damage to one place must not cost the whole tar, else nothing would be tested here.
    assert counts.pairs > 5 * cases
    assert counts.offered > 0.65 * counts.pairs


def test_a_slice_of_damaged_tars(tmp_path: Path) -> None:
    check(fuzz(SLICE, tmp_path), len(SLICE))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_tars(tmp_path: Path) -> None:
    check(fuzz(SOAK, tmp_path), len(SOAK))
