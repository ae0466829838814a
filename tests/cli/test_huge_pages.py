"""The command restarts itself once with huge pages, and says the same things either way."""

import os
import subprocess
import sys

import pytest

from dsv4_jax.cli import huge_pages

SHOW = "import os, sys; from dsv4_jax.cli import main; main(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"


def run_command(**environment: str) -> str:
    command = [sys.executable, "-c", SHOW, "--help"]
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not huge_pages.available(), reason="no transparent huge pages for malloc here")
def test_the_command_runs_once_with_huge_pages_and_keeps_its_arguments() -> None:
    text = run_command(GLIBC_TUNABLES="glibc.malloc.arena_max=8")
    assert text.count("usage: dsv4") == 1
    assert text.endswith("glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1 ['--help']\n")


def test_a_choice_in_the_environment_is_left_alone() -> None:
    assert run_command(GLIBC_TUNABLES="glibc.malloc.hugetlb=0").endswith("glibc.malloc.hugetlb=0 ['--help']\n")


def test_systems_without_glibc_or_huge_pages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("restarted"))
    monkeypatch.setattr(os, "confstr", lambda _: None)
    huge_pages.restart_with_huge_pages()
    monkeypatch.setattr(sys, "platform", "darwin")
    huge_pages.restart_with_huge_pages()
