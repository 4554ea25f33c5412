"""One Engram layer's training step, everything but the hash, as its table grows.

    python -m benchmarks.engram_layer [--json PATH]

B 4, T 512, d 256, M 4, 2 orders x 8 heads, d_mem 640, float32: gather, projection, gate,
convolution, their gradients, AdamW on the layer's weights, and the table's update. `rowwise` is
the code that trains; `dense` differentiates through the gather and runs Adam over the whole table,
as MaxText's layer does (its published times on 2 cores stand beside). Every run has a
process of its own, the variants in turn: beside a dense table of the same size, on a machine whose
memory it fills, the row-wise step would wait for its own pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

BATCH, LENGTH, WIDTH, STREAMS = 4, 512, 256, 4
ROWS_PER_HEAD = (20_000, 200_000, 800_000)
MAXTEXT_SECONDS = (0.375, 0.639, 1.329)  # its Engram layer with dense Adam, 2 cores
BOUNDS = (0.8, 0.45, 0.2)
TURNS, ROUNDS = 2, 7
VARIANTS = ("rowwise", "dense")


def build(variant: str, rows_per_head: int) -> Callable[[], None]:
    """A training step of the layer; every call is one, and returns when it is done."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from engram_jax.config import EngramConfig, OptimizerConfig
    from engram_jax.layers.engram import Engram
    from engram_jax.memory.row_gradients import deduplicate
    from engram_jax.memory.table import TableLayout, init_table, lookup
    from engram_jax.training.optim import rowwise_adam

    config = EngramConfig(layers=(1,), d_mem=640, rows_per_head=(rows_per_head,))
    options = OptimizerConfig()
    module = Engram(
        WIDTH,
        STREAMS,
        config,
        norm_eps=1e-6,
        init_std=0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    adamw = optax.adamw(1e-3)
    rng = np.random.default_rng(0)
    shape = (BATCH, LENGTH, config.heads)
    offsets = np.arange(config.heads) * rows_per_head
    addresses = [
        jnp.asarray(rng.integers(0, rows_per_head, shape) + offsets, jnp.int32) for _ in range(4)
    ]
    streams = jnp.asarray(rng.normal(size=(BATCH, LENGTH, STREAMS, WIDTH)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=streams.shape), jnp.float32)
    segments = jnp.ones((BATCH, LENGTH), jnp.int32)
    rate = jnp.float32(1e-3)

    def loss(params: Any, rows: jax.Array, streams: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(rows, streams, segments)[0] * cotangent)

    def weights_step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def rowwise(table: Any, params: Any, state: Any, ids: jax.Array, step: jax.Array) -> Any:
        rows = lookup(table.rows, ids)
        grads = jax.grad(loss, argnums=(0, 1, 2))(params, rows, streams)
        unique = deduplicate(ids, grads[1])
        table, _ = rowwise_adam.update(table, unique, unique.addresses, rate, step, config=options)
        return table, *weights_step(params, state, grads[0]), jnp.sum(grads[2])

    def dense(table: Any, params: Any, state: Any, ids: jax.Array, step: jax.Array) -> Any:
        def through_table(params: Any, rows: jax.Array, streams: jax.Array) -> jax.Array:
            return loss(params, rows[ids], streams)

        del step
        rows, own = table
        grads = jax.grad(through_table, argnums=(0, 1, 2))(params, rows, streams)
        rows, own = weights_step(rows, own, grads[1])
        return (rows, own), *weights_step(params, state, grads[0]), jnp.sum(grads[2])

    layout = TableLayout(rows_per_head * config.heads)
    table: Any = init_table(jax.random.key(0), layout, config.dim, 0.02, jnp.float32)
    if variant == "dense":
        table = (table.rows, adamw.init(table.rows))
    step_fn = jax.jit({"rowwise": rowwise, "dense": dense}[variant], donate_argnums=(0, 1, 2))
    carry, steps = (table, params, adamw.init(params)), 0
    del table

    def call() -> None:
        nonlocal carry, steps
        ids, step = addresses[steps % len(addresses)], jnp.int32(steps)
        *carry, _ = jax.block_until_ready(step_fn(*carry, ids, step))
        steps += 1

    return call


def alone(rows_per_head: int, variant: str) -> dict[str, Any]:
    """Seconds per round of one variant, and this process's peak of memory."""
    seconds = harness.take_turns({variant: build(variant, rows_per_head)}, rounds=ROUNDS)
    return {"seconds": seconds[variant], "peak_bytes": harness.peak_memory()}


def in_process(rows_per_head: int, variant: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engram_layer"]
    command += ["--size", str(rows_per_head), "--variant", variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=harness.ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> Result:
    figures, details = [], {}
    for rows, theirs, bound in zip(ROWS_PER_HEAD, MAXTEXT_SECONDS, BOUNDS, strict=True):
        runs: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
        for _ in range(TURNS):
            for variant in VARIANTS:
                runs[variant].append(in_process(rows, variant))
        seconds = {v: [s for run in found for s in run["seconds"]] for v, found in runs.items()}
        peaks = {v: max(run["peak_bytes"] for run in found) for v, found in runs.items()}
        ours, dense = (statistics.median(seconds[variant]) for variant in VARIANTS)
        table = 16 * rows * 40 * 4
        label = f"{rows // 1000}k rows per head"
        note = f"MaxText's {theirs * 1e3:.0f} ms; table and moments are {3 * table / 1e9:.2f} GB"
        figures += [
            Figure(f"{label}: rowwise", ours * 1e3, "ms", note=note),
            Figure("  to MaxText's", ours / theirs, "x", at_most=bound),
            Figure("  to our dense Adam", ours / dense, "x", note=f"{dense * 1e3:.0f} ms"),
            Figure(
                "  peak memory",
                peaks["rowwise"] / 1e9,
                "GB",
                note=f"dense Adam {peaks['dense'] / 1e9:.2f} GB",
            ),
        ]
        details[label] = {"seconds": seconds, "peak_bytes": peaks, "table_bytes": table}
    setting = (
        f"training step of one Engram layer, B {BATCH}, T {LENGTH}, d {WIDTH}, M {STREAMS},"
        f" 16 heads x 40; medians of {TURNS} x {ROUNDS} rounds"
    )
    return Result("engram_layer", setting, figures, details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--size", type=int)
    parser.add_argument("--variant", choices=VARIANTS)
    known, _ = parser.parse_known_args()
    if known.size:
        print(json.dumps(alone(known.size, known.variant)))
    else:
        harness.main(measure)
