"""A training step costs what it touches, not what it owns: the demo with 1x, 10x and 100x the rows.

    python -m benchmarks.table_growth [--json PATH]

The same step with Adam over the whole table (`memory_optimizer = "dense_adam"`) is the comparison.
All variants take turns in one process.
"""

from __future__ import annotations

import dataclasses
import statistics

from benchmarks import harness
from benchmarks.demo_model import Training, batches, demo_config, demo_program
from benchmarks.harness import Figure, Result

ROUNDS = 15
FACTORS = (1, 10, 100)
OPTIMIZERS = ("rowwise_adam", "dense_adam")


def measure() -> Result:
    base = demo_config()
    data = batches(base)
    runs, rows = {}, {}
    for optimizer in OPTIMIZERS:
        for factor in FACTORS:
            grown = tuple(factor * size for size in base.model.engram.rows_per_head)
            config = demo_config(rows_per_head=grown)
            config = dataclasses.replace(
                config,
                optimizer=dataclasses.replace(config.optimizer, memory_optimizer=optimizer),
            )
            program = demo_program(config)
            runs[f"{optimizer}/{factor}x"] = Training(program, data)
            rows[factor] = sum(program.table_rows.values())
    seconds = harness.take_turns(runs, rounds=ROUNDS)

    figures = []
    for optimizer in OPTIMIZERS:
        own = seconds[f"{optimizer}/1x"]
        for factor in FACTORS:
            name, label = (
                f"{optimizer}/{factor}x",
                f"{optimizer}, {factor}x = {rows[factor]:,} rows",
            )
            figures.append(Figure(label, statistics.median(seconds[name]) * 1e3, "ms"))
            if factor > 1:
                bound = 1.10 if optimizer == "rowwise_adam" else None
                growth = harness.ratio(seconds[name], own)
                figures.append(Figure(f"  to its 1x: {factor}x", growth, "x", at_most=bound))
    engram = base.model.engram
    setting = (
        f"training step of {base.name}, {base.data.batch_size} x {base.data.seq_len} tokens,"
        f" {len(engram.layers)} layers x {engram.heads} heads, rows of {engram.dim};"
        f" medians of {ROUNDS} interleaved rounds"
    )
    return Result("table_growth", setting, figures, {"seconds": seconds, "rows": rows})


if __name__ == "__main__":
    harness.main(measure)
