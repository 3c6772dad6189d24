"""What libraries say: errors are shown, the rest is kept from the terminal unless its variable asks for it.

That whole runs print farnear's own lines and no others is seen where such runs are: tests/test_demo.py under zero2,
tests/test_launch.py under ddp, each on two ranks.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farnear.noise import OWN_WARNINGS, _Shown, quiet_worker

REPORT = """\033[1mModel LOAD REPORT\033[0m from: some/model
Key               | Status     |
------------------+------------+-
lm_head.weight    | UNEXPECTED |
layers.0.weight   | MISSING    |
layers.1.weight   | MISMATCH   | Reinit due to size mismatch
"""

TALK = """
import logging, os, sys, warnings
for name in ("DeepSpeed", "odd"):  # as libraries do when they are imported; transformers does it by itself
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
from farnear.noise import quiet
quiet()
for name in ("transformers.models.x", "DeepSpeed", "odd", "sentence_transformers.y"):
    logging.getLogger(name).warning("a warning of %s", name)
    logging.getLogger(name).error("an error of %s", name)
warnings.warn("of Python's")
print("printed")
"""


def talked(environment: dict[str, str]) -> tuple[list[str], list[str]]:
    """Lines of standard output and error."""
    # In CI transformers hands its messages on to the root's handlers too.
    plain = {key: value for key, value in os.environ.items() if not key.endswith("VERBOSITY") and key != "CI"}
    ended = subprocess.run(
        [sys.executable, "-c", TALK], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return ended.stdout.splitlines(), ended.stderr.splitlines()


def test_a_rank_shows_errors_and_its_log_has_the_rest(tmp_path: Path) -> None:
    names = ("transformers.models.x", "DeepSpeed", "odd", "sentence_transformers.y")
    out, err = talked({"RANK": "0", "FARNEAR_LOG_DIR": str(tmp_path), "PYTHONWARNINGS": OWN_WARNINGS})
    assert out == ["printed"]
    assert err == [f"{name}: an error of {name}" for name in names]
    kept = (tmp_path / "rank-00000.log").read_text()
    assert all(f"WARNING {name}: a warning of {name}" in kept for name in names)
    assert "UserWarning: of Python's" in kept and "an error" not in kept


def test_another_rank_says_no_word_but_errors_and_a_variable_wins() -> None:
    out, err = talked({"RANK": "1", "TRANSFORMERS_VERBOSITY": "warning", "PYTHONWARNINGS": "default"})
    assert out == []
    own = [f"[transformers] {what} of transformers.models.x" for what in ("a warning", "an error")]
    assert err[:2] == own
    assert [line for line in err if "a warning of" in line] == own[:1]
    assert any(line.endswith("UserWarning: of Python's") for line in err)


def record(name: str, level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, message, (), None)


def test_weights_that_a_checkpoint_lacks_are_told_in_a_line() -> None:
    said = record("transformers.modeling_utils", logging.WARNING, REPORT)
    assert _Shown({}, is_main=True).filter(said)
    assert said.getMessage() == (
        "2 weights are not in the model's files and start at random: layers.0.weight layers.1.weight"
    )
    assert not _Shown({}, is_main=False).filter(record("transformers.modeling_utils", logging.WARNING, REPORT))
    only_more = REPORT.replace("MISSING", "UNEXPECTED").replace("MISMATCH", "UNEXPECTED")
    assert not _Shown({}, is_main=True).filter(record("transformers.modeling_utils", logging.WARNING, only_more))


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_LOG_LEVEL", "accelerate.tracking"),
        ("TORCH_LOGS", "torch.distributed"),
        ("HF_HUB_VERBOSITY", "huggingface_hub.x"),
    ],
)
def test_a_librarys_own_variable_wins(variable: str, name: str) -> None:
    said = record(name, logging.INFO, "something")
    assert not _Shown({}, is_main=True).filter(said)
    assert _Shown({variable: "info"}, is_main=True).filter(said)
    assert not _Shown({variable: ""}, is_main=True).filter(said)
    assert not _Shown({"PYTHONWARNINGS": OWN_WARNINGS}, is_main=True).filter(
        record("py.warnings", logging.WARNING, "x")
    )


def test_a_data_worker_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, root = logging.getLogger("transformers"), logging.getLogger()
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(root, "handlers", [*root.handlers])
    quiet_worker({"TRANSFORMERS_VERBOSITY": "info", "PYTHONWARNINGS": "default"})
    assert logger.level == logging.WARNING
    quiet_worker({"PYTHONWARNINGS": "default"})
    assert logger.level == logging.ERROR
