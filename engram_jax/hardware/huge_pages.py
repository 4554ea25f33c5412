"""Huge pages for what malloc hands out, which is what XLA's CPU programs compute in.

XLA allocates a program's intermediate arrays anew for every run of it and frees them at its end:
252 MB in a step of the demo's base model (benchmarks/cpu_step.py), for which the kernel finds and
zeroes 62,000 pages of 4 KiB, one fault each, in 0.13 s of processor time. In pages of 2 MiB it
takes 0.04 s. glibc (from 2.35) asks for them if a tunable says so when a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this program again with the tunable set; returns if it is, or would do nothing.

    For the first lines of a program: what it has done by then, it does again. GLIBC_TUNABLES is
    left as it is if it mentions the tunable: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps 4 KiB.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not _available():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _available() -> bool:
    """Whether libc knows the tunable and the kernel gives huge pages on request."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:
        return False
