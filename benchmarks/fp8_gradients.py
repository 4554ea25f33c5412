"""How far the gradients of FP8 (and bfloat16) projections point from float32's, on a trained demo.

    python -m benchmarks.fp8_gradients --workdir=runs/engram_tiny --step=latest

One batch of held-out text, the same parameters: cosine to the gradient with everything in float32,
of all parameters and rows together and of every parameter of the Engram modules. The gate is
sigmoid(sign(s) sqrt|s|): infinitely steep at s = 0, so tokens with a score near 0 carry most of the
squared norm of a gradient, and rounding turns theirs. "other text" is the cosine between float32's
own gradients of two batches: what a step's gradient tells of another's.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import engram_tiny
from engram_jax.checkpoint import table_order
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.checkpoint.workdir import parse_step
from engram_jax.config import Config, parse_config
from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import open_on_all_processes
from engram_jax.training.state import build_training
from engram_jax.training.step import batch_addresses, fetch_rows, gradients
from kernels_pallas.engram_gate.quantise import RECIPES

BATCHES = 2


def variants(config: Config) -> dict[str, Config]:
    """float32 and what is compared with it: name -> configuration."""
    named = {"float32": {}, "bf16": {"precision": "bf16"}}
    named |= {f"fp8 {r}": {"precision": "fp8", "fp8_recipe": r} for r in RECIPES}
    return {name: _with(config, keys) for name, keys in named.items()}


def _with(config: Config, keys: dict[str, str]) -> Config:
    engram = dataclasses.replace(config.model.engram, **keys)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, engram=engram))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/engram_tiny"))
    parser.add_argument("--step", default="latest")
    flags = parser.parse_args()
    config = parse_config(engram_tiny.get_config())
    data = open_on_all_processes(config)
    program = build_training(config, data.addressing)
    with Checkpointer(flags.workdir, addressing=data.addressing, read_only=True) as checkpointer:
        restored = table_order.restore(program, checkpointer, parse_step(flags.step))
    step, state = restored.step, restored.state
    size = config.data.batch_size
    batches = [
        place_batch(program.mesh, batch, size)
        for batch in data.validation_batches(program.mesh, BATCHES)
    ]
    found = {}
    for name, variant in variants(config).items():
        run = build_training(variant, data.addressing)
        found[name] = run.jit(partial(of_batch, run))(state, batches[0])
    found["other text"] = program.jit(partial(of_batch, program))(state, batches[1])

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


def _memory(name: str) -> bool:
    return name.startswith(("engrams", "rows/"))


if __name__ == "__main__":
    main()
