"""One job at a time works in a run folder, and a job that was killed is in nobody's way."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_jax.errors import UserError
from train import run_lock
from train.run_lock import LOCK, alone_in

ROOT = Path(__file__).parents[2]
HOLDER = """
import pathlib, sys, time
from train.run_lock import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"run is in use by process {holder.pid} on \S+, since 2"):
            alone_in(tmp_path / "run").__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with alone_in(tmp_path / "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        alone_in(tmp_path / "run").__enter__()


def test_a_lock_of_another_machine_is_waited_for_as_long_as_a_dead_one_may_keep_it(tmp_path, monkeypatch):
    elsewhere = {"host": "elsewhere", "process": 7, "since": "noon"}
    monkeypatch.setattr(run_lock, "LEASE", 0.1)
    monkeypatch.setattr(run_lock, "PAUSE", 0.03)
    first = alone_in(tmp_path)
    first.__enter__()
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="in use by process 7 on elsewhere, since noon"):
        alone_in(tmp_path).__enter__()
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: first.__exit__(None, None, None))
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_nothing_of_it_stays_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with alone_in(tmp_path / name):
            assert [path.name for path in (tmp_path / name).iterdir()] == [LOCK]
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


def test_a_lock_that_its_holder_deleted_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, how):
        flock(file, how)
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).exists()
        with pytest.raises(UserError, match="in use"):
            alone_in(tmp_path).__enter__()


def test_without_locks_it_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(tmp_path):
        assert "has no locks" in caplog.text and not list(tmp_path.iterdir())
