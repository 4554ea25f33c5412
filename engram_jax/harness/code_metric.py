"""pass@k of programs that a model wrote: what `evaluate` calls "code_eval", without a download.

The programs run. Each is a process of its own in an empty folder, without this one's environment,
with limits on its time, memory and files. That bounds accidents; it is no sandbox: a program may
read what this user may, and use the network. So it runs only where the user has said so.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MEMORY = 4 << 30  # bytes of address space
FILE = 1 << 20  # bytes of a file that it writes

_PRELUDE = f"""
import resource as _r
_r.setrlimit(_r.RLIMIT_AS, ({MEMORY}, {MEMORY}))
_r.setrlimit(_r.RLIMIT_FSIZE, ({FILE}, {FILE}))
_r.setrlimit(_r.RLIMIT_CORE, (0, 0))
del _r
"""


class CodeEval:
    """The metric's interface, as tasks use it."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 0,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """references: the tests of each problem. predictions: the programs for each. k: how many
        may be tried; those above the number of programs are left out. num_workers: run at a time,
        0 = as many as there are processors. timeout: seconds for each.

        Returns (means over problems by "pass@K", what each program did).
        """
        jobs = [
            (problem, number, f"{program}\n{test}")
            for problem, (test, programs) in enumerate(zip(references, predictions, strict=True))
            for number, program in enumerate(programs)
        ]
        with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
            ends = list(pool.map(lambda job: run(job[2], timeout), jobs))
        found: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for (problem, number, _), end in zip(jobs, ends, strict=True):
            told = {"task_id": problem, "completion_id": number, "passed": end == "", "result": end}
            found[problem].append((number, told))
        counts = [(len(tried), sum(t["passed"] for _, t in tried)) for tried in found.values()]
        fewest = min((n for n, _ in counts), default=0)
        means = {
            f"pass@{most}": sum(pass_at(most, n, c) for n, c in counts) / len(counts)
            for most in k
            if most <= fewest
        }
        return means, dict(found)


def pass_at(k: int, tried: int, passed: int) -> float:
    """The unbiased estimate that one of k programs passes (arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(tried - passed, k) / math.comb(tried, k)


def run(program: str, seconds: float) -> str:
    """Run a program; "" if it ended by itself with status 0, else what happened."""
    with tempfile.TemporaryDirectory(prefix="engram-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-"],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, said = process.communicate((_PRELUDE + program).encode("utf-8", "replace"), seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
    if process.returncode == 0:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    return f"failed: {lines[-1] if lines else process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
