"""How far the gradients of FP8 (and bfloat16) projections point from float32's, on a trained run.

    python -m benchmarks.fp8_gradients --workdir=runs/engram_tiny --step=latest

One batch of held-out text, the same parameters: cosine to the gradient with everything in float32,
of all parameters and rows together and of every parameter of the Engram modules. The gate is
sigmoid(sign(s) sqrt|s|): infinitely steep at s = 0, so tokens with a score near 0 carry most of the
squared norm of a gradient, and rounding turns theirs. "other text" is the cosine between float32's
own gradients of two batches: what a step's gradient tells of another's.

Then the gate alone on Gaussian arguments (--seeds of them): lowest and highest cosine of every
gradient. --seeds=0 leaves it out, and `--workdir=` the run.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.run_record import get_config
from engram_jax.checkpoint.workdir import parse_step
from engram_jax.config import BF16, FP8, MODEL, Config, parse_config
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import open_on_all_processes
from engram_jax.training.state import abstract_state, build_training
from engram_jax.training.step import batch_addresses, fetch_rows, gradients
from kernels_pallas.engram_gate.api import engram_gate
from kernels_pallas.engram_gate.quantise import RECIPES

BATCHES = 2
# Of the Gaussian arguments.
TOKENS, D_MEM, STREAMS, WIDTH = 2048, 256, 4, 256
ARGUMENTS = ("rows", "weights", "streams", "gain")


def variants(config: Config) -> dict[str, Config]:
    """float32 and what is compared with it: name -> configuration."""
    named = {"float32": {"precision": MODEL}, "bf16": {"precision": BF16}}
    named |= {f"fp8 {r}": {"precision": FP8, "fp8_recipe": r} for r in RECIPES}
    return {name: _with(config, keys) for name, keys in named.items()}


def _with(config: Config, keys: dict[str, str]) -> Config:
    """In float32 but for what `keys` say of the projection."""
    changes: dict[str, Any] = dict(keys)
    engram = dataclasses.replace(config.model.engram, **changes)
    model = dataclasses.replace(config.model, dtype="float32", engram=engram)
    return dataclasses.replace(config, model=model)


def of_batch(program: Any, state: Any, batch: Any) -> dict[str, Any]:
    """Gradients of one batch by name: parameters' paths, and rows/<layer>."""
    rows, _ = fetch_rows(program, state.memory, batch_addresses(program, batch))
    _, params, of_rows, _ = gradients(program, state, rows, batch)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return named | {f"rows/{layer}": g for layer, g in of_rows.items()}


def cosine(a: dict[str, Any], b: dict[str, Any], names: list[str]) -> float:
    dots = [sum(jnp.vdot(x[n], y[n]) for n in names) for x, y in ((a, b), (a, a), (b, b))]
    return float(dots[0] / jnp.sqrt(dots[1] * dots[2]))


def of_run(workdir: Path, wanted: str) -> None:
    """Of a batch of the run's held-out text, with its own configuration."""
    config = parse_config(get_config(f"{wanted}:{workdir}"))
    data = open_on_all_processes(config)
    program = build_training(config, data.addressing)
    with Checkpointer(workdir, addressing=data.addressing, read_only=True) as checkpointer:
        restored = table_order.restore(
            program, checkpointer, parse_step(wanted), abstract_state(program)
        )
    step, state = restored.step, restored.state
    size = config.data.batch_size
    batches = [
        place_batch(program.mesh, batch, size)
        for batch in data.validation_batches(program.mesh, BATCHES)
    ]
    found, runs = {}, {}
    for name, variant in variants(config).items():
        run = runs[name] = build_training(variant, data.addressing)
        found[name] = run.jit(partial(of_batch, run))(state, batches[0])
    found["other text"] = runs["float32"].jit(partial(of_batch, runs["float32"]))(state, batches[1])

    every = sorted(found["float32"])
    groups = {"everything": every, "Engram modules and rows": [n for n in every if _memory(n)]}
    groups |= {n: [n] for n in every if _memory(n)}
    others = [name for name in found if name != "float32"]
    print(
        f"step {step}; cosine to float32's gradient\n{'':36}" + "".join(f"{o:>13}" for o in others)
    )
    for group, names in groups.items():
        values = (cosine(found[o], found["float32"], names) for o in others)
        print(f"{group:36}" + "".join(f"{v:13.5f}" for v in values))


def of_gaussians(seeds: int) -> None:
    """Of the gate: bfloat16 with its arguments rounded, too, FP8 of float32 arguments."""
    forms = {"bf16": (jnp.bfloat16, None)} | {f"fp8 {r}": (jnp.float32, r) for r in RECIPES}
    found: dict[str, list[Any]] = {name: [] for name in forms}
    for seed in range(seeds):
        exact = _gaussian(jnp.float32, None, seed)
        for name, (dtype, recipe) in forms.items():
            ours = _gaussian(dtype, recipe, seed)
            found[name].append([cosine(ours, exact, [n]) for n in ARGUMENTS])
    print(f"Gaussian arguments, {seeds} seeds{'':15}" + "".join(f"{name:>16}" for name in forms))
    for k, argument in enumerate(ARGUMENTS):
        columns = ([cosines[k] for cosines in found[name]] for name in forms)
        ranges = (f"{min(c):.2f} to {max(c):.2f}" for c in columns)
        print(f"{argument:36}" + "".join(f"{r:>16}" for r in ranges))


def _gaussian(dtype: Any, recipe: str | None, seed: int) -> dict[str, jax.Array]:
    """Gradients of the gate's output, by name of the argument, in float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows, weights = normal(TOKENS, D_MEM), normal(D_MEM, STREAMS + 1, WIDTH) * D_MEM**-0.5
    streams, g = normal(TOKENS, STREAMS, WIDTH), normal(TOKENS, STREAMS, WIDTH)
    args = [x.astype(dtype) for x in (rows, weights, streams)]
    gain = jnp.ones((STREAMS, WIDTH))
    gate = partial(engram_gate, eps=1e-6, recipe=recipe)
    _, pullback = jax.vjp(lambda *args: gate(*args)[0], *args, gain)
    gradients = pullback(g.astype(dtype))
    return {n: x.astype(jnp.float32) for n, x in zip(ARGUMENTS, gradients, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/engram_tiny")
    parser.add_argument("--step", default="latest")
    parser.add_argument("--seeds", type=int, default=8)
    flags = parser.parse_args()
    if flags.workdir:
        of_run(Path(flags.workdir), flags.step)
    if flags.seeds:
        of_gaussians(flags.seeds)


def _memory(name: str) -> bool:
    return name.startswith(("engrams", "rows/"))


if __name__ == "__main__":
    main()
