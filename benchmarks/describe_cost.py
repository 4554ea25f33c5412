"""How long describing Engram-27B takes and how much memory, as a whole process.

python -m benchmarks.describe_cost [--json PATH]
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.harness import Figure, Result

CONFIG = "configs/engram27b.py"
ROUNDS = 3


def measure() -> Result:
    command = [sys.executable, "launch.py", f"--config={CONFIG}", "--mode=describe", "--json"]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=harness.ROOT)
        seconds.append(time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    figures = [
        Figure("wall time", statistics.median(seconds), "s", at_most=20.0),
        Figure("peak memory", peak / 2**30, "GiB", at_most=1.0),
    ]
    setting = f"launch.py --config={CONFIG} --mode=describe --json, median of {ROUNDS}"
    return Result("describe_cost", setting, figures, {"seconds": seconds, "peak_bytes": peak})


if __name__ == "__main__":
    harness.main(measure)
