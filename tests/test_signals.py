"""Signals: noted whatever the process is doing, answered by all ranks alike, and a second Ctrl-C is obeyed at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from tiny_runs import run_config

from farnear.parallel.world import World, start_world, stop_world
from farnear.signals import STOPPING, Signals
from farnear.training.guard import Asked, Guard, StopAskedError

# A second lock of the same mutex waits for ever, and no signal gets the thread out of it.
IN_A_HANG = """
import ctypes, signal, sys, threading, time
from farnear.signals import STOPPING, Signals
for number in STOPPING:
    signal.signal(number, signal.SIG_DFL)  # whatever runs the tests may ignore signals, which is inherited
mutex = ctypes.create_string_buffer(256)
with Signals() as signals:
    def tell():
        while signals.first is None:
            time.sleep(0.01)
        print(signals.first.name, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def start_hang() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", IN_A_HANG], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_in_a_hang_and_a_sigint_after_it_ends_it(number: signal.Signals) -> None:
    process = start_hang()
    try:
        assert process.stdout is not None
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_handlers_are_as_before_afterwards() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while signals.first is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert signals.first is signal.SIGUSR1
    assert {number: signal.getsignal(number) for number in STOPPING} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_what_is_ignored_on_purpose_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert signals.first is None
    finally:
        signal.signal(signal.SIGINT, previous)


def test_another_thread_than_the_main_one_hears_nothing_and_does_no_harm() -> None:
    heard: list[Any] = []

    def work() -> None:
        with Signals() as signals:
            heard.append(signals.first)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [None]


def ask_each_other(rank: int, world_size: int) -> None:
    world = start_world(run_config(Path(), "unused", strategy="ddp"))
    first = {1: signal.SIGUSR1, 2: signal.SIGTERM}.get(rank)
    guard = Guard(world, SimpleNamespace(first=None))  # type: ignore[arg-type]
    assert guard.ask() == Asked()
    guard.stop_if_asked()
    assert guard.ask(save_failed=rank == 2) == Asked(save_failed=True)
    guard = Guard(world, SimpleNamespace(first=first))  # type: ignore[arg-type]
    # SIGTERM is the larger number, but any one would do, as long as it is the same on all ranks.
    assert guard.ask() == Asked(signal.SIGTERM, 2)
    with pytest.raises(StopAskedError, match="SIGTERM at rank 2"):
        guard.stop_if_asked()
    stop_world()


def test_all_ranks_are_told_what_came_to_one() -> None:
    run_ranks(ask_each_other, 3)


def test_alone_there_is_nobody_to_ask() -> None:
    import torch

    alone = World(0, 1, torch.device("cpu"))
    assert Guard(alone).ask() == Asked()
    assert Guard(alone, SimpleNamespace(first=signal.SIGINT)).ask() == Asked(signal.SIGINT, 0)  # type: ignore[arg-type]
