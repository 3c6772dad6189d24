"""`farnear encode` in this process, one rank: that its command starts ranks is tested by itself."""

from collections.abc import Sequence
from typing import Any

import pytest

from farnear.commands.encode import rank_command
from farnear.launching import local


def encode_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Until the test ends. Returns the words that each rank was started with."""
    started: list[list[str]] = []

    before = local.supervise

    def supervise(command: Sequence[str], *arguments: Any, **keys: Any) -> int:
        if not any(word.endswith("launch/encode.py") for word in command):
            return before(command, *arguments, **keys)
        started.append(list(command))
        return rank_command(list(command)[-3:])

    monkeypatch.setattr(local, "supervise", supervise)
    return started
