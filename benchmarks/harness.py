"""What every benchmark shares: turns, peaks of memory and machine, the table and the JSON.

A benchmark is a file with a `measure() -> Result` that ends in `harness.main(measure)`; it runs in
a process of its own, so that a peak of memory is its own, too. Nothing heavy is imported at the
top: what a parent process occupies would count in the peak of a child it starts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram_jax.hardware.cores import cores

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """One line of the table: a number, the bound it must keep, if any, and what is beside it."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        high = float("inf") if self.at_most is None else self.at_most
        return (self.at_least or 0.0) <= self.value <= high


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome; `details` are the raw numbers behind the figures, JSON values."""

    benchmark: str
    setting: str
    figures: list[Figure]
    details: dict[str, Any] = field(default_factory=dict)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call in every round. Each call must block until its work is done.

    The calls run A B C A B C ..: whatever else the machine does meets all of them.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of one call's time by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_memory() -> int:
    """Bytes this process has occupied at most so far (on Linux from its exec on)."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


@dataclass(frozen=True)
class Peaks:
    """What this machine can do, for floors: float32 matrix products and copies of memory."""

    flops_per_s: float
    bytes_per_s: float

    def floor(self, *, flops: float = 0.0, bytes_moved: float = 0.0) -> str:
        """What some work cannot take less than here, in words."""
        seconds = flops / self.flops_per_s + bytes_moved / self.bytes_per_s
        work = [f"{flops / 1e9:.3g} GFLOP"] * bool(flops)
        work += [f"{bytes_moved / 1e6:.3g} MB"] * bool(bytes_moved)
        return f"floor {' + '.join(work)} = {seconds * 1e3:.3g} ms"


def machine_peaks(size: int = 1536) -> Peaks:
    """Best of a few: a [size, size] product by XLA, a copy of 256 MB by every core at once."""
    import threading

    import jax
    import jax.numpy as jnp
    import numpy as np

    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    blocks = [(np.ones(1 << 25, np.float32), np.ones(1 << 25, np.float32)) for _ in range(cores())]

    def copy() -> None:
        threads = [threading.Thread(target=np.copyto, args=block) for block in blocks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    calls = {"product": lambda: jax.block_until_ready(product(x)), "copy": copy}
    seconds = take_turns(calls, rounds=7)
    moved = sum(a.nbytes + b.nbytes for a, b in blocks)
    return Peaks(2 * size**3 / min(seconds["product"]), moved / min(seconds["copy"]))


def machine() -> dict[str, Any]:
    """Device, versions, commit and date: what the numbers were taken on and with."""
    import jax

    from engram_jax.monitoring import provenance

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "cpu": provenance.cpu_model(),
        "cores": cores(),
        "memory_GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "versions": provenance.versions(),
        "git": provenance.git_commit(ROOT / "engram_jax"),
    }


def table(result: Result) -> str:
    """The result as Markdown, columns aligned."""
    heads = ("figure", "value", "must be", "", "beside it")
    lines = [heads, *(_cells(figure) for figure in result.figures)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rows = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    title = f"{result.benchmark}: {result.setting}"
    return "\n".join([title, "", rows[0], rule, *rows[1:]])


def _cells(figure: Figure) -> tuple[str, ...]:
    value = f"{figure.value:.3g} {figure.unit}".rstrip()
    bound = ""
    if figure.at_most is not None:
        bound = f"<= {figure.at_most:.3g}"
    elif figure.at_least is not None:
        bound = f">= {figure.at_least:.3g}"
    verdict = {None: "", True: "yes", False: "NO"}[figure.met]
    return figure.name, value, bound, verdict, figure.note


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Everything measured, and what it was measured on."""
    benchmarks = {
        result.benchmark: {
            "setting": result.setting,
            "figures": [{**asdict(figure), "met": figure.met} for figure in result.figures],
            "details": result.details,
        }
        for result in results
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), "benchmarks": benchmarks}, indent=1) + "\n")


def main(measure: Callable[[], Result], arguments: Sequence[str] | None = None) -> None:
    """The command line of one benchmark: its table, and with --json its file.

    arguments: what the benchmark has left of the command line; None = all of it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    options = parser.parse_args(arguments)
    result = measure()
    print(table(result), flush=True)
    if options.json:
        write_json(options.json, [result])
