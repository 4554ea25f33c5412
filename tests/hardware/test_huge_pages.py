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


def environment(**env):
    kept = {k: v for k, v in os.environ.items() if k != huge_pages.RESTARTED}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2])} | env


def start(arguments, **options):
    env = {k: options.pop(k) for k in list(options) if k.isupper()}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def run(tmp_path, **env):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = start([script, "--flag", "a b"], **env)
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
    not_started_again(monkeypatch)


def not_started_again(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    huge_pages.restart_with_huge_pages()


BEGINNING = """
import os, sys
print("started", file=open(os.environ["SAID"], "a"))
os.environ.pop(os.environ.get("DROPPED", ""), None)
from engram_jax.hardware.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
"""


def starts(tmp_path, arguments, **options):
    """How often the program begins."""
    (tmp_path / "package").mkdir()
    for file in ("program.py", "package/__main__.py"):
        (tmp_path / file).write_text(BEGINNING)
    done = start(arguments, GLIBC_TUNABLES="", SAID=str(tmp_path / "said"), cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "said").read_text().count("started")


@available
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["program.py"], 2),
        (["-X", "dev", "-O", "program.py"], 2),
        (["-m", "package"], 2),
        (["-c", "import runpy; runpy.run_path('program.py', run_name='__main__')"], 1),
        (["-m", "cProfile", "-o", "profile", "program.py"], 1),
        (["-m", "runpy", "program"], 1),
        (["-"], 1),
    ],
)
def test_only_a_process_of_its_own_is_replaced(arguments, expected, tmp_path):
    stdin = {"input": BEGINNING} if arguments == ["-"] else {}
    assert starts(tmp_path, arguments, **stdin) == expected


@available
def test_where_the_tunable_is_taken_away_it_is_tried_once(tmp_path):
    """As libc does for programs with capabilities of their own."""
    assert starts(tmp_path, ["program.py"], DROPPED="GLIBC_TUNABLES") == 2


@available
def test_closed_streams(tmp_path):
    (tmp_path / "program.py").write_text(BEGINNING)
    command = f"exec {sys.executable} program.py >&- 2>&-"
    env = environment(GLIBC_TUNABLES="", SAID="said")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert (tmp_path / "said").read_text().count("started") == 2


def test_an_interpreter_that_does_not_know_its_file(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "executable", "")
    not_started_again(monkeypatch)
