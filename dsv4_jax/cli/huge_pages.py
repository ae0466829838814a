"""Huge pages for the C library's allocator.

XLA's CPU backend asks malloc for gigabytes in every step and gives them back. In pages of 4 KiB the kernel then spends
a third of the machine clearing and mapping them; with transparent huge pages a training step takes about a third less
time (docs/benchmarks.md). glibc reads the setting when a process starts, so the command starts itself once more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Replace this process by itself with huge pages, where glibc and the kernel have them and nobody chose already.

    Call it before anything is loaded. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment keeps small pages.
    """
    if available() and TUNABLE not in os.environ.get("GLIBC_TUNABLES", ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())


def environment() -> dict[str, str]:
    """This process's environment with huge pages asked for."""
    tunables = [value for value in (os.environ.get("GLIBC_TUNABLES"), f"{TUNABLE}=1") if value]
    return os.environ | {"GLIBC_TUNABLES": ":".join(tunables)}


def available() -> bool:
    """glibc 2.35 or newer on Linux, with transparent huge pages that a program may ask for."""
    if sys.platform != "linux" or not SWITCH.exists() or "[never]" in SWITCH.read_text():
        return False
    known = "CS_GNU_LIBC_VERSION" in os.confstr_names
    name, _, version = ((os.confstr("CS_GNU_LIBC_VERSION") if known else None) or "").partition(" ")
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
