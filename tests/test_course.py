"""How long a run still takes: by steps, and by what comes between them, as far as that has happened before."""

import pytest

from farnear.course import Course, Pace, course_of, duration

COURSE = Course(total_steps=100, epochs=2, ranks=2, eval_steps=20, save_steps=50, refresh_steps=50, evaluates=True)


def paced(seconds: list[float]) -> Pace:
    pace = Pace()
    pace.take(steps=[{"step": step, "seconds": {"data": 0.0, "pass_one": each}} for step, each in enumerate(seconds)])
    return pace


def test_what_is_to_come_is_counted_once_it_has_a_length() -> None:
    pace = paced([60.0, 2.0, 2.0])
    assert Pace().left_text(COURSE, 0) == ""
    # The first step, which warms up, is no measure for the others.
    assert pace.left(COURSE, 30) == (140.0, ["evaluations", "minings", "the evaluation at the end"])
    assert pace.left_text(COURSE, 30) == "2:20 left without evaluations and minings and the evaluation at the end"
    pace.take(evaluations=[{"kind": "before", "seconds": 600.0}])
    assert pace.left(COURSE, 30) == (740.0, ["evaluations", "minings"])
    pace.took("during", 10.0)
    pace.took("mining", 100.0)
    pace.took("save", 1.0)
    # Evaluations at 40, 60, 80 and 100, a mining at 50 and none at the end, saves at 50 and 100.
    assert pace.left(COURSE, 30) == (740.0 + 40.0 + 100.0 + 2.0, [])
    assert pace.left(COURSE, 60) == (80.0 + 600.0 + 20.0 + 1.0, [])
    assert pace.left(COURSE, 100) == (600.0, [])


def test_old_steps_do_not_count() -> None:
    assert paced([100.0] * 50 + [1.0] * 50).left(Course(110, 1, 1), 100) == (10.0, [])


def test_a_run_tells_its_course_and_others_read_it() -> None:
    assert course_of({"state": "running", "step": 0, **COURSE.as_plain()}) == COURSE
    assert course_of({"state": "running", "step": 0}) is None
    assert course_of({}) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3600, "1:00:00"),
        (86400, "1 day 0:00:00"),
        (2e5, "2 days 7:33:20"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
