"""Quotas: weights hold at every prefix, streams go on over the edges of epochs, steps and epochs agree."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from farnear.data.quotas import Int64, Schedule, make_schedule
from farnear.errors import UserError

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)

WEIGHT = st.one_of(st.integers(1, 6), st.integers(1, 60), st.floats(0.001, 1, exclude_min=True))


def schedule(pairs: tuple[int, ...], G: int, mixing: str, tail: str, weights: tuple[float, ...] | None) -> Schedule:
    return make_schedule(pairs, weights, global_batch_size=G, mixing=mixing, tail=tail)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, tuple[Fraction, ...]]:
    """A schedule and the weights that it has to keep to, which sum to 1."""
    pairs = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    weights = draw(st.none() | st.lists(WEIGHT, min_size=len(pairs), max_size=len(pairs)))
    mixing, tail = draw(st.sampled_from(["per_batch", "within_batch"])), draw(st.sampled_from(["carry", "pad", "drop"]))
    try:
        result = schedule(tuple(pairs), draw(st.integers(1, 12)), mixing, tail, weights and tuple(weights))
    except UserError:
        assume(False)
    exact = [Fraction(str(weight)) for weight in weights or pairs]
    return result, tuple(weight / sum(exact) for weight in exact)


def pairs_of_steps(plan: Schedule, epoch: int) -> Int64:
    """How many pairs of each source each step of an epoch shows: [S, K]."""
    steps = plan.steps_before(epoch + 1) - plan.steps_before(epoch)
    shown = np.zeros((steps, len(plan.pairs)), np.int64)
    for source, stretch in enumerate(plan.stretches(epoch)):
        assert (np.diff(stretch.step_C) > 0).all()
        shown[stretch.step_C, source] = stretch.stop_C - stretch.start_C
        assert (shown[stretch.step_C, source] > 0).all()
    return shown


@EXAMPLES
@given(schedules(), st.integers(1, 4))
def test_weights_hold_at_every_prefix_of_steps(case: tuple[Schedule, tuple[Fraction, ...]], epochs: int) -> None:
    plan, weights = case
    given_K = [0] * len(weights)
    for epoch in range(epochs):
        for pairs_K in pairs_of_steps(plan, epoch):
            units_K = pairs_K if plan.mixing == "within_batch" else (pairs_K > 0)
            given_K = [given + int(units) for given, units in zip(given_K, units_K, strict=True)]
            assert all(abs(given - weight * sum(given_K)) < 1 for given, weight in zip(given_K, weights, strict=True))
        assert given_K[plan.largest] == int(weights[plan.largest] * sum(given_K))


@EXAMPLES
@given(schedules())
def test_batches_are_full_but_for_the_end_of_a_padded_pass(case: tuple[Schedule, tuple[Fraction, ...]]) -> None:
    plan, _ = case
    for epoch in range(3):
        shown_SK = pairs_of_steps(plan, epoch)
        total_S = shown_SK.sum(axis=1)
        assert len(total_S) >= 1 and (total_S >= 1).all() and (total_S <= plan.global_batch_size).all()
        if plan.mixing == "per_batch":
            assert ((shown_SK > 0).sum(axis=1) == 1).all()
        if plan.tail != "pad":
            assert (total_S == plan.global_batch_size).all()
        elif plan.mixing == "within_batch":
            assert (total_S[:-1] == plan.global_batch_size).all()


@EXAMPLES
@given(schedules())
def test_streams_go_on_over_the_edges_of_epochs(case: tuple[Schedule, tuple[Fraction, ...]]) -> None:
    """Every position of a stream exactly once and in order; only what ``drop`` counts is left out."""
    plan, _ = case
    epochs = 4
    stretches = [plan.stretches(epoch) for epoch in range(epochs)]
    left_out = sum(plan.left_out(epoch) for epoch in range(epochs))
    for source, pairs in enumerate(plan.pairs):
        of_source = [stretch_K[source] for stretch_K in stretches]
        start = np.concatenate([stretch.start_C for stretch in of_source])
        stop = np.concatenate([stretch.stop_C for stretch in of_source])
        gaps = start - np.append(0, stop)[: len(start)]
        assert (gaps >= 0).all()
        if plan.tail != "drop":
            assert (gaps == 0).all()
        # What is left out is the end of a pass, and less than a batch of it.
        for gap, first in zip(gaps[gaps > 0], start[gaps > 0], strict=True):
            assert first % pairs == 0 and gap < plan.global_batch_size + 1
        left_out -= int(gaps.sum())
        if source == plan.largest and plan.tail != "carry":
            for epoch, stretch in enumerate(of_source):
                assert stretch.start_C[0] == epoch * pairs
                if plan.tail == "pad":
                    assert stretch.stop_C[-1] == (epoch + 1) * pairs
                elif epoch == epochs - 1:  # no next pass shows what its end left out
                    left_out -= (epoch + 1) * pairs - int(stretch.stop_C[-1])
        elif plan.tail == "drop" and plan.mixing == "per_batch" and len(stop) and stop[-1] % pairs:
            rest = pairs - int(stop[-1]) % pairs
            left_out -= rest if rest < plan.global_batch_size and rest == pairs % plan.global_batch_size else 0
    assert left_out == 0


@EXAMPLES
@given(schedules())
def test_steps_and_epochs_agree(case: tuple[Schedule, tuple[Fraction, ...]]) -> None:
    plan, _ = case
    assert plan.steps_before(0) == 0
    for epoch in (0, 1, 2, 3, 10**6, 10**12):
        first, stop = plan.steps_before(epoch), plan.steps_before(epoch + 1)
        assert stop > first
        assert plan.epoch_of(first) == plan.epoch_of(stop - 1) == epoch
    lengths = {plan.steps_before(epoch + 1) - plan.steps_before(epoch) for epoch in range(50)}
    assert max(lengths) - min(lengths) <= 1


@EXAMPLES
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 10**15))
def test_steps_of_one_source(pairs: int, G: int, epoch: int) -> None:
    padded = schedule((pairs,), G, "within_batch", "pad", None)
    assert padded.steps_before(epoch) == epoch * -(-pairs // G)
    if pairs >= G:
        assert schedule((pairs,), G, "per_batch", "carry", None).steps_before(epoch) == epoch * pairs // G
        dropped = schedule((pairs,), G, "within_batch", "drop", (0.3,))
        assert dropped.steps_before(epoch) == epoch * (pairs // G)
        assert dropped.left_out(epoch % 1000) == pairs % G


@EXAMPLES
@given(schedules(), st.integers(1, 30))
def test_an_epoch_far_ahead_needs_none_before_it(case: tuple[Schedule, tuple[Fraction, ...]], epoch: int) -> None:
    """Where the count of a long run is taken up again, it is what a count from step 0 gives."""
    plan, _ = case
    start = [stretch.start_C[0] if len(stretch.start_C) else None for stretch in plan.stretches(epoch)]
    shown_K = sum(pairs_of_steps(plan, each).sum(axis=0) for each in range(epoch))
    for source, position in enumerate(start):
        if plan.tail != "drop" and position is not None:
            assert position == shown_K[source]


def test_order_of_batches_by_hand() -> None:
    """Weights 2:1:1. The largest has given floor(t / 2) after t steps; the others take turns."""
    plan = schedule((20, 20, 20), 10, "per_batch", "pad", (2, 1, 1))
    order = [int(pairs_K.argmax()) for epoch in range(2) for pairs_K in pairs_of_steps(plan, epoch)]
    assert order == [1, 0, 2, 0, 1, 0, 2, 0]


def test_weights_are_the_decimals_they_are_written_as() -> None:
    assert schedule((9, 9), 4, "per_batch", "carry", (0.7, 0.3)).shares == (7, 3)
    assert schedule((9, 9), 4, "per_batch", "carry", (14, 6)).shares == (7, 3)
    assert schedule((30, 12), 4, "per_batch", "carry", None).shares == (5, 2)


@pytest.mark.parametrize(
    ("pairs", "weights", "largest"),
    [((9, 5), (1, 2), 1), ((5, 9, 9), (2, 2, 2), 1), ((5, 5), (1, 1), 0), ((5, 7), None, 1)],
)
def test_the_largest_source_sets_the_epoch(
    pairs: tuple[int, ...], weights: tuple[float, ...] | None, largest: int
) -> None:
    plan = schedule(pairs, 2, "within_batch", "pad", weights)
    assert plan.largest == largest
    assert pairs_of_steps(plan, 1).sum(axis=0)[largest] == pairs[largest]


@pytest.mark.parametrize(
    ("pairs", "G", "mixing", "tail", "weights", "message"),
    [
        (
            (7,), 8, "within_batch", "carry", None,
            "the data has 7 pairs, but a global batch of 8 pairs must not hold a pair twice; "
            "set a smaller training.global_batch_size, or data.tail: pad",
        ),
        (
            (20, 7), 8, "per_batch", "drop", (1, 1),
            "source 2 of 2 has 7 pairs, but a global batch of 8 pairs must not hold a pair twice; "
            "set a smaller training.global_batch_size, or data.tail: pad",
        ),
        (
            (20, 3), 8, "within_batch", "pad", (1, 1),
            "source 2 of 2 has 3 pairs, but a global batch of 8 pairs takes 4 of them and must not hold a pair twice; "
            "set a smaller training.global_batch_size",
        ),
        (
            (5, 5), 2, "within_batch", "pad", (1, 0),
            "the weight of source 2 of 2 is 0, and a source is shown by its weight; give a positive number, or leave "
            "the source out",
        ),
        (
            (5, 5), 2, "within_batch", "pad", (1,),
            "there are 1 weights for 2 sources, so it is open how often a source is shown; give one weight a source",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said_in_one_line(
    pairs: tuple[int, ...], G: int, mixing: str, tail: str, weights: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        schedule(pairs, G, mixing, tail, weights)
    assert str(caught.value) == message


def test_fewer_pairs_than_a_batch_are_one_short_batch_when_padded() -> None:
    assert pairs_of_steps(schedule((3,), 8, "within_batch", "pad", None), 5).tolist() == [[3]]
    assert pairs_of_steps(schedule((3, 2), 8, "per_batch", "pad", (2, 1)), 0).tolist() == [[0, 2], [3, 0]]
