"""Pallas kernels against XLA and the roofline, timed on the accelerator at hand.

    python -m benchmarks.kernels --json=benchmarks/results/kernels_h200.json
    python -m benchmarks.kernels --only "engram_gate engram27b"

Each case runs in turns with the others' variants, over several sets of inputs, so that none finds
them in a cache. The roofline is measured on the same device: a copy of 1 GiB for bandwidth, a large
matrix product (bfloat16, and e4m3 where it runs) for arithmetic. "of roofline" is the floor's time
(bytes / bandwidth or FLOPs / rate, whichever is longer) over the kernel's. On a CPU they would be
interpreted; benchmarks.kernels_aot is for machines without an accelerator.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.kernels_aot import OPS
from kernels_pallas.cases import OURS, XLA, Case

SETS = 3  # of inputs
CALLS = 10  # in a row, between two looks at the clock
ROUNDS = 15
COPIED = 1 << 30  # bytes
SIZE = 8192  # of the square product


def inputs(arguments: Any, seed: int) -> Any:
    """Random arrays of these shapes: normal numbers, ones for integers, masks with holes, scales
    about one."""
    leaves, tree = jax.tree.flatten(arguments)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(like: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if like.dtype == jnp.uint8:  # exponents of powers of two
            return jax.random.randint(key, like.shape, 120, 128).astype(jnp.uint8)
        if like.dtype == jnp.bool_:  # masks
            return jax.random.bernoulli(key, 0.9, like.shape)
        if jnp.issubdtype(like.dtype, jnp.integer):
            return jnp.ones(like.shape, like.dtype)
        return (jax.random.normal(key, like.shape, jnp.float32) * 0.1).astype(like.dtype)

    return jax.tree.unflatten(tree, [make(*pair) for pair in zip(leaves, keys, strict=True)])


def seconds_of(
    calls: dict[str, Callable[..., Any]], sets: list[Any], rounds: int
) -> dict[str, float]:
    """Median seconds per call, variants in turns."""
    jitted = {name: jax.jit(function) for name, function in calls.items()}

    def run(name: str, first: int) -> float:
        start = time.perf_counter()
        out = [jitted[name](*sets[(first + k) % len(sets)]) for k in range(CALLS)]
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / CALLS

    for name in jitted:
        run(name, 0)
    times: dict[str, list[float]] = {name: [] for name in jitted}
    for r in range(rounds):
        for name in jitted:
            times[name].append(run(name, r))
    return {name: statistics.median(found) for name, found in times.items()}


def roofline() -> dict[str, float]:
    """Bytes/s of a copy (read + write) and FLOP/s of products, measured here."""
    x = jnp.ones((COPIED // 4,), jnp.float32)
    copied = seconds_of({"copy": lambda x: x + 1}, [(x,)], ROUNDS)["copy"]
    found = {"bytes": 2 * COPIED / copied}
    for name, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
        a = jnp.ones((SIZE, SIZE), jnp.bfloat16).astype(dtype)

        def product(a: jax.Array) -> jax.Array:
            return jnp.matmul(a, a.T, preferred_element_type=jnp.bfloat16)

        try:
            taken = seconds_of({"product": product}, [(a,)], ROUNDS)["product"]
            found[name] = 2 * SIZE**3 / taken
        except jax.errors.JaxRuntimeError:
            found[name] = found["bf16"]  # no e4m3 products here: they run as bfloat16
    return found


def measure(case: Case, peaks: dict[str, float], rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of every variant, the floor's, and what the two make of each other."""
    sets = [inputs(case.arguments, seed) for seed in range(SETS)]
    taken = seconds_of(dict(case.variants), sets, rounds)
    rate = peaks["fp8" if case.fp8 else "bf16"]
    floor = max(case.bytes / peaks["bytes"], case.flops / rate)
    return {
        "seconds": taken,
        "floor_seconds": floor,
        "speedup": taken[XLA] / taken[OURS],
        "of_roofline": floor / taken[OURS],
        "of_copy_bandwidth": case.bytes / peaks["bytes"] / taken[OURS],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of an op's and a case's name")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    if jax.default_backend() == "cpu":
        print(
            "no accelerator: kernels do not run on a CPU; python -m benchmarks.kernels_aot compiles"
            " them for TPUs",
            file=sys.stderr,
        )
        return 2
    peaks = roofline()
    print(" ".join(f"{name} {value / 1e12:.2f}e12/s" for name, value in peaks.items()))
    results: dict[str, Any] = {}
    for op in OPS:
        for case in importlib.import_module(f"kernels_pallas.{op}.bench").cases():
            label = f"{op} {case.name}"
            if flags.only not in label:
                continue
            try:
                found = results[label] = measure(case, peaks)
            except Exception as error:
                found = results[label] = {"failed": f"{type(error).__name__}: {error}"[:500]}
                print(f"{label:46} failed: {found['failed']}", flush=True)
                continue
            print(
                f"{label:46} XLA {found['seconds'][XLA] * 1e6:9.1f} us"
                f"  ours {found['seconds'][OURS] * 1e6:9.1f} us  {found['speedup']:5.2f}x"
                f"  of roofline {found['of_roofline']:5.1%}"
                f"  of copy bandwidth {found['of_copy_bandwidth']:5.1%}",
                flush=True,
            )
    if flags.json:
        device = jax.devices()[0].device_kind
        report = {"device": device, "machine": harness.machine(), "peaks": peaks}
        flags.json.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
