"""A program that starts again with the allocator's tunable for huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram_jax.hardware import huge_pages

PROGRAM = """
import ctypes, os, re, sys
print("started")
from engram_jax.hardware.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 << 20
ctypes.memset(libc.malloc(ctypes.c_size_t(size)), 1, size)
kib = sum(map(int, re.findall(r"AnonHugePages: +([0-9]+) kB", open("/proc/self/smaps").read())))
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], kib)
sys.exit(3)
"""

available = pytest.mark.skipif(
    not huge_pages._available(), reason="no huge pages on request, or a libc without the tunable"
)


def run(tmp_path, **env):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script, "--flag", "a b"],
        env=os.environ | {"PYTHONPATH": str(root)} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    *starts, last = done.stdout.splitlines()
    tunables, rest = last.split(" ", 1)
    arguments, kib = rest.rsplit(" ", 1)
    assert arguments == "['--flag', 'a b']"
    return len(starts), tunables, int(kib)


@available
def test_malloc_gets_huge_pages(tmp_path):
    starts, tunables, kib = run(tmp_path, GLIBC_TUNABLES="")
    assert (starts, tunables) == (2, "glibc.malloc.hugetlb=1")
    assert kib >= 62 << 10


@available
def test_other_tunables_stay(tmp_path):
    starts, tunables, _ = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert (starts, tunables) == (2, "glibc.malloc.check=0:glibc.malloc.hugetlb=1")


def test_who_sets_the_tunable_keeps_it(tmp_path):
    starts, tunables, kib = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert (starts, tunables) == (1, "glibc.malloc.hugetlb=0")
    assert kib < 32 << 10


@pytest.mark.parametrize("libc", [("musl", "1.2.5"), ("glibc", "2.31"), ("", "")])
def test_without_the_tunable_nothing_happens(libc, monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    huge_pages.restart_with_huge_pages()
