"""pass@k of programs, and what happens to those that do not end well."""

from __future__ import annotations

import itertools
import os
import time

import pytest

from engram_jax.harness.code_metric import CodeEval, pass_at, run


def test_pass_at_k_is_the_share_of_draws_with_a_program_that_passes():
    for tried, passed in itertools.product(range(1, 6), range(6)):
        for k in range(1, tried + 1):
            draws = [*itertools.combinations(range(tried), k)]
            share = sum(any(n < passed for n in draw) for draw in draws) / len(draws)
            if passed <= tried:
                assert pass_at(k, tried, passed) == pytest.approx(share)


def test_programs_are_run_and_counted():
    """As the tasks HumanEval and MBPP call it."""
    good, bad = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"
    means, each = CodeEval().compute(
        references=["assert add(2, 3) == 5", "assert add(1, 1) == 2"],
        predictions=[[good, bad], [bad, bad]],
        k=[1, 2, 5],
    )
    assert means == {"pass@1": 0.25, "pass@2": 0.5}
    assert [told["passed"] for _, told in each[0] + each[1]] == [True, False, False, False]
    assert each[0][1][1]["result"].endswith("AssertionError")


def test_a_program_has_little(tmp_path, monkeypatch):
    """A folder of its own, no environment, no input, bounded memory and files."""
    monkeypatch.setenv("SECRET", "x")
    assert run("import os; assert 'SECRET' not in os.environ and os.listdir() == []", 20) == ""
    assert "EOFError" in run("input()", 20)
    assert "MemoryError" in run("x = bytearray(5 << 30)", 20)
    assert run("open('a', 'wb').write(bytes(2 << 20))", 20).startswith("failed")
    assert run("import sys; sys.exit(3)", 20) == "failed: 3"


def test_a_program_that_does_not_end_is_ended_with_its_children(tmp_path):
    file = tmp_path / "pid"
    child = "import time; time.sleep(600)"
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(file)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    assert run(program, 2) == "timed out"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{file.read_text()}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # ended; whoever inherits it has not looked yet
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {file.read_text()} of {os.getpid()} is still there")
