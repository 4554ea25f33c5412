"""What the Engram modules add to a training step of the demo's backbone, and where it goes.

    python -m benchmarks.overhead [--json PATH]

The same configuration with and without memory take turns; then each part alone: hashing, gather,
the modules forward and backward, summing duplicates, updating the rows.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

ROUNDS = 25


def parts(config: Any) -> dict[str, Any]:
    """The memory's share of a step in pieces, for all Engram layers together: name -> call."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.demo_model import batches, demo_program
    from engram_jax.config.random_streams import MEMORY, stream
    from engram_jax.layers.engram import Engram
    from engram_jax.memory.row_gradients import deduplicate
    from engram_jax.memory.table import init_memory, lookup
    from engram_jax.training.optim import rowwise_adam
    from engram_jax.training.step import batch_addresses

    program, batch = demo_program(config), batches(config)[0]
    model, engram = config.model, config.model.engram
    memory = init_memory(stream(0, MEMORY), program.layouts, engram.dim, engram.init_std)
    module = Engram(
        model.d_model,
        model.hyper.streams,
        engram,
        norm_eps=model.norm_eps,
        init_std=model.init_std,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(module)
    shape = (config.data.batch_size, config.data.seq_len, model.hyper.streams, model.d_model)
    streams = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    hashing = jax.jit(lambda b: batch_addresses(program, b))
    addresses = jax.block_until_ready(hashing(batch))
    gather = jax.jit(lambda m, a: {k: lookup(m[k].rows, a[k]) for k in a})
    rows = jax.block_until_ready(gather(memory, addresses))

    def loss(params: Any, rows: jax.Array, streams: jax.Array) -> jax.Array:
        out = nnx.merge(graphdef, params)(rows, streams, batch["segments"])[0]
        return jnp.sum(out * streams)

    @jax.jit
    def fusion(rows: Any) -> Any:
        grad = jax.grad(loss, argnums=(0, 1, 2))
        return [grad(params, r, streams) for r in rows.values()]

    summing = jax.jit(lambda a, r: {k: deduplicate(a[k], r[k]) for k in a})
    gradients = jax.block_until_ready(summing(addresses, rows))

    def update(memory: Any, gradients: Any) -> Any:
        options = {"rate": jnp.float32(1e-3), "step": jnp.int32(0), "config": config.optimizer}
        return {
            k: rowwise_adam.update(memory[k], g, g.addresses, **options)[0]
            for k, g in gradients.items()
        }

    updating = jax.jit(update, donate_argnums=0)
    carried = [jax.tree.map(jnp.copy, memory)]

    def run_update() -> None:
        carried[0] = jax.block_until_ready(updating(carried[0], gradients))

    return {
        "addresses": lambda: jax.block_until_ready(hashing(batch)),
        "gather": lambda: jax.block_until_ready(gather(memory, addresses)),
        "modules, forward and backward": lambda: jax.block_until_ready(fusion(rows)),
        "sum of duplicates": lambda: jax.block_until_ready(summing(addresses, rows)),
        "update of the rows": run_update,
    }


def measure() -> Result:
    from benchmarks.demo_model import Training, batches, demo_config, demo_program

    with_memory, without = demo_config(), demo_config(layers=())
    data = batches(with_memory)
    steps = {
        "with": Training(demo_program(with_memory), data),
        "without": Training(demo_program(without), data),
    }
    seconds = harness.take_turns(steps, rounds=ROUNDS)
    split = harness.take_turns(parts(with_memory), rounds=ROUNDS)
    backbone = statistics.median(seconds["without"])
    added = harness.ratio(seconds["with"], seconds["without"]) - 1
    figures = [
        Figure("step without memory", backbone * 1e3, "ms"),
        Figure("step with memory", statistics.median(seconds["with"]) * 1e3, "ms"),
        Figure("the memory adds", 100 * added, "%", at_most=25.0),
    ]
    for name, times in split.items():
        share = statistics.median(times) / backbone
        note = f"{100 * share:.1f} % of the step without memory"
        figures.append(Figure(f"  {name}, alone", statistics.median(times) * 1e3, "ms", note=note))
    setting = (
        f"training step of {with_memory.name}, {with_memory.data.batch_size} x"
        f" {with_memory.data.seq_len} tokens; medians of {ROUNDS} interleaved rounds"
    )
    return Result("overhead", setting, figures, {"seconds": seconds, "split": split})


if __name__ == "__main__":
    harness.main(measure)
