"""What a run does when it is asked to end: the first signal saves, the second ends, and words come at once."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import multihost_utils

from train.interruptions import Terminated, Termination
from train.stage_run import StageRun


@pytest.fixture
def said():
    return []


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_the_first_ctrl_c_asks_and_the_second_interrupts(said):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Termination(said.append) as termination:
        assert termination.asked() is None
        interrupt()
        assert termination.asked() == signal.SIGINT
        assert said == ["SIGINT: saving after this step; Ctrl-C again ends at once"]
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before
    assert Terminated(signal.SIGINT).code == 130


def test_a_signal_that_is_ignored_stays_ignored(said):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Termination(said.append) as termination:
            interrupt()
            assert termination.asked() is None and not said
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_heard_while_the_main_thread_would_compile(said):
    """The work is one that Python's main thread could not be woken from."""
    release = threading.Event()
    with Termination(said.append) as termination:
        assert termination.during(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            termination.during(lambda: 1 // 0)
        threading.Timer(0.1, interrupt, [signal.SIGTERM]).start()
        began = time.monotonic()
        with pytest.raises(Terminated) as ended:
            termination.during(lambda: release.wait(60))
        assert time.monotonic() - began < 30 and ended.value.code == 143
        assert said == ["SIGTERM: saving after this step"]
    release.set()


def test_several_processes_agree_on_ctrl_c_as_on_sigterm(said, monkeypatch):
    """What agrees hears SIGTERM alone, so SIGINT is handed on; work goes on until all are there."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: bool(heard) and step > 2)
    try:
        with Termination(said.append) as termination:
            assert termination.asked() is None
            interrupt()
            assert heard == [signal.SIGTERM] and termination.during(lambda: 3) == 3
            assert termination.asked() is None  # the others are not there yet
            assert termination.asked() == signal.SIGINT
        with Termination(said.append) as other:
            assert [other.asked() for _ in range(3)] == [None, None, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("first", "kept", "saves", "words"),
    [
        (0, [], [], "SIGINT: nothing was saved yet"),
        (4, [4], [], "SIGINT: saved step 4. The same command goes on from there"),
        (6, [4], [6], "SIGINT: saved step 6. The same command goes on from there"),
    ],
)
def test_a_run_that_ends_while_it_compiles_saves_what_is_not_saved_yet(said, monkeypatch, first, kept, saves, words):
    def asked_meanwhile(_):
        raise Terminated(signal.SIGINT)

    saved = []
    monkeypatch.setattr(StageRun, "save", lambda self, done, *_: (saved.append(done), kept.append(done)))
    shared = SimpleNamespace(recipe=SimpleNamespace(stages=[None]), say=said.append)
    checkpoints = SimpleNamespace(steps=kept, wait=lambda: None)
    termination = SimpleNamespace(during=asked_meanwhile)
    run = StageRun(shared, checkpoints, None, None, None, None, None, termination)
    with pytest.raises(Terminated):
        run.run(SimpleNamespace(step=first), 0, 0, None)
    assert (saved, said) == (saves, [words])
