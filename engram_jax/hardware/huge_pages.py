"""Huge pages for what malloc hands out, which is what XLA's CPU programs compute in.

XLA allocates a program's intermediate arrays anew for every run of it and frees them at its end:
252 MB in a step of the demo's base model (benchmarks/cpu_step.py), for which the kernel finds and
zeroes 62,000 pages of 4 KiB, one fault each, in 0.13 s of processor time. In pages of 2 MiB it
takes 0.04 s. glibc (from 2.35) asks for them if a tunable says so when a process starts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
RESTARTED = "ENGRAM_JAX_RESTARTED"  # in the environment: it was tried once
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # options of Python with a word of their own


def restart_with_huge_pages() -> None:
    """Start this program again, once, with the tunable set; returns where that would do nothing.

    For the first lines of a program: what it has done by then, it does again. GLIBC_TUNABLES is
    left as it is if it mentions the tunable: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps 4 KiB.
    Only a process that was started as `python FILE` or `python -m engram_jax` is replaced, not a
    debugger's, a profiler's or another program that runs the file.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if RESTARTED in os.environ or TUNABLE in tunables:
        return
    if not (sys.executable and _is_the_process() and _available()):
        return
    changed = {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{TUNABLE}=1"))), RESTARTED: "1"}
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.flush()
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | changed)


def _is_the_process() -> bool:
    """Whether Python was started to run the main module, and nothing around it."""
    main = sys.modules["__main__"]
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word == "-m":
            spec = getattr(main, "__spec__", None)
            return spec is not None and spec.parent == next(words, "")
        elif not word.startswith("-"):
            return os.path.realpath(word) == os.path.realpath(getattr(main, "__file__", None) or "")
    return False


def _available() -> bool:
    """Whether libc knows the tunable and the kernel gives huge pages on request."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:
        return False
