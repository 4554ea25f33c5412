"""Rows from a file that is not in memory: how reads are kept under way.

    python -m benchmarks.disk_gather --json=benchmarks/results/disk_gather.json [--folder=/tmp]

Writes a table of 8 GB into the folder and has the kernel forget it before each round (fadvise
DONTNEED). Random rows of 256 bytes, each in a block of 4,096 of its own, read by `DiskTable` with
as many blocks announced ahead as said.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Figure, Result, table, write_json
from engram_jax.memory.store import file_table
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.row_format import RowFormat

FORMAT, ROWS, LOOKUPS, ROUNDS = RowFormat("float32", 64), 32_000_000, 8_192, 5


def measure(folder: Path) -> Result:
    path = folder / "memory.safetensors"
    chunk = np.random.default_rng(0).normal(size=(1_000_000, 64)).astype(np.float32)
    began = time.perf_counter()
    write_memory(path, {"1": (FORMAT, ROWS, [chunk] * (ROWS // len(chunk)))}, "none")
    writing = ROWS * FORMAT.row_bytes / (time.perf_counter() - began) / 1e9
    began = time.perf_counter()
    source = open_memory(path).disk("1")
    opening = time.perf_counter() - began
    rng, out = np.random.default_rng(1), FORMAT.empty(LOOKUPS)

    def forget() -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fresh() -> np.ndarray:
        return np.unique(rng.integers(0, ROWS, LOOKUPS + 100))[:LOOKUPS]

    def read(ids: np.ndarray, piece: np.ndarray) -> None:
        parts = [piece] if len(piece) == len(ids) else np.array_split(piece, len(piece) // 128 or 1)
        for part in parts:
            source.gather(ids[part], tuple(o[part[0] : part[-1] + 1] for o in out))

    def gather(ahead: int, threads: int) -> float:
        """Microseconds per row. One caller: large requests are shared by the cores."""
        forget()
        ids, kept = fresh(), file_table.AHEAD
        pieces = np.array_split(np.arange(len(ids)), threads)
        file_table.AHEAD = ahead
        try:
            workers = [threading.Thread(target=read, args=(ids, piece)) for piece in pieces]
            began = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return 1e6 * (time.perf_counter() - began) / len(ids)
        finally:
            file_table.AHEAD = kept

    cases = {"1 caller, none ahead": (0, 1), "16 callers, none ahead": (0, 16)}
    cases |= {"64 callers, none ahead": (0, 64)}
    cases |= {f"1 caller, {ahead} ahead": (ahead, 1) for ahead in (4, 16, 64, 256)}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (ahead, threads) in cases.items():
            found[name].append(gather(ahead, threads))
    micro = {name: statistics.median(values) for name, values in found.items()}
    ids = fresh()
    source.gather(ids, out)
    began = time.perf_counter()
    source.gather(ids, out)
    micro["in the page cache"] = 1e6 * (time.perf_counter() - began) / len(ids)
    best = micro["1 caller, 64 ahead"]
    figures = [
        Figure(name, value, "us per row", note=f"{1e6 / value:,.0f} rows per second")
        for name, value in micro.items()
    ]
    speed = micro["1 caller, none ahead"] / best
    figures.append(Figure("announcing blocks ahead", speed, "x", at_least=2))
    figures.append(Figure("opening the file", opening, "s", at_most=2))
    figures.append(Figure("writing it, checksums included", writing, "GB/s"))
    return Result("disk_gather", f"{ROWS:,} rows of 256 bytes", figures, {"us per row": micro})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        outcome = measure(Path(scratch))
    print(table(outcome), flush=True)
    if options.json:
        write_json(options.json, [outcome])
