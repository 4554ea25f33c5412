"""The demo's training step on a mesh of 8 CPU devices, and what of it is the exchange of rows.

    python -m benchmarks.eight_devices [--json PATH]

Eight devices share this machine's cores, so nothing gets faster: the step's work is the same, and
what it takes longer than on one device is the mesh's own (exchanges, collected weights, eight
programs instead of one). With and without memory, on one device and on eight, take turns.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

ROUNDS, DEVICES = 15, 8


def exchange_alone(config: Any, mesh: Any, data: Any) -> Any:
    """A call of everything a step exchanges: plan, rows forward, gradients back, update."""
    import jax
    import jax.numpy as jnp

    from benchmarks.demo_model import demo_program
    from engram_jax.training.state import create_state
    from engram_jax.training.step import batch_addresses, fetch_rows
    from engram_jax.training.updates import update_memory

    program = demo_program(config, mesh)
    carried = [create_state(program).memory]
    batch = data[0]

    def step(memory: Any, batch: Any) -> Any:
        rows, plans = fetch_rows(program, memory, batch_addresses(program, batch))
        exchanges = program.exchanges()
        sent = {k: exchanges[k].send(r, plans[k]) for k, r in rows.items()}
        now = (jnp.float32(1), jnp.int32(0), jnp.bool_(True))
        return update_memory(program, memory, plans, sent, *now)[0]

    run = jax.jit(step, donate_argnums=0)

    def call() -> None:
        carried[0] = jax.block_until_ready(run(carried[0], batch))

    return call


def measure() -> Result:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    )
    import jax

    from benchmarks.demo_model import Training, batches, demo_config, demo_program
    from engram_jax.sharding.rules import make_mesh

    with_memory, without = demo_config(), demo_config(layers=())
    data = batches(with_memory)
    one, eight = (make_mesh(with_memory.mesh, jax.devices()[:n]) for n in (1, DEVICES))
    seconds = harness.take_turns(
        {
            "1, with": Training(demo_program(with_memory, one), data),
            "1, without": Training(demo_program(without, one), data),
            "8, with": Training(demo_program(with_memory, eight), data),
            "8, without": Training(demo_program(without, eight), data),
            "1, exchange": exchange_alone(with_memory, one, data),
            "8, exchange": exchange_alone(with_memory, eight, data),
        },
        rounds=ROUNDS,
    )
    median = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    figures = [
        Figure("step on 1 device", median["1, with"], "ms"),
        Figure("step on 8 devices", median["8, with"], "ms"),
        Figure("8 devices over 1", harness.ratio(seconds["8, with"], seconds["1, with"]), "x"),
        Figure(
            "the same without memory",
            harness.ratio(seconds["8, without"], seconds["1, without"]),
            "x",
        ),
        Figure("lookup and update alone, 1 device", median["1, exchange"], "ms"),
        Figure("exchange and update alone, 8 devices", median["8, exchange"], "ms"),
        Figure(
            "exchange in the step of 8 devices",
            100 * harness.ratio(seconds["8, exchange"], seconds["8, with"]),
            "%",
        ),
    ]
    setting = f"training step of {with_memory.name}, mesh of 1 and of fsdp {DEVICES}, one machine"
    return Result("eight_devices", setting, figures, {"milliseconds": median})


if __name__ == "__main__":
    harness.main(measure)
