"""Block sizes for kernels, into kernels_pallas/<op>/tuned.json.

    python -m benchmarks.tune_kernels            # for the accelerator at hand, else for every TPU
    python -m benchmarks.tune_kernels --ops engram_gate --slices v5p:2x2x1

On an accelerator every candidate is timed, and the fastest is kept for the device's kind. Without
one nothing is timed: candidates are ordered by a roofline (bytes that the kernel moves / bandwidth
against products / peak, the latter less for blocks narrower than the matrix unit; ties go to fewer
bytes, then to wider blocks), and the first that the compiler accepts for a TPU generation is kept.
Ops whose blocks all move the same bytes are left to their own rule then.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks import kernels
from benchmarks.kernels_aot import OPS, SLICES
from engram_jax.aot.one_chip import compile_operation
from engram_jax.aot.topology import Topology, slice_topology
from engram_jax.hardware.generations import GENERATIONS
from kernels_pallas import traffic, tuning
from kernels_pallas.cases import OURS, Case

ROOT = Path(__file__).resolve().parent.parent
MATRIX_UNIT = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}  # columns
HOW = "python -m benchmarks.tune_kernels: by a roofline, ahead of time; not timed on a TPU"
Key = tuple[str, str]


def moved(topology: Topology, case: Case) -> int:
    """Bytes that the kernels of a case move, traced for a chip of the slice."""
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    run = jax.shard_map(
        case.variants[OURS],
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return sum(traffic.kernel_bytes(run, *case.arguments).values())


def cost(topology: Topology, case: Case, blocks: dict[str, int]) -> tuple[float, int, int]:
    """(seconds by the roofline, bytes, - columns) under the blocks that are being tried."""
    generation, found = GENERATIONS[topology.generation], moved(topology, case)
    busy = min(1.0, blocks.get("columns", 256) / MATRIX_UNIT[generation.name])
    products = case.flops / (topology.peak_flops * busy)
    return max(found / generation.hbm_bandwidth, products), found, -blocks.get("columns", 0)


def fits(topology: Topology, case: Case) -> bool:
    try:
        compile_operation(topology, case.variants[OURS], *case.arguments)
    except jax.errors.JaxRuntimeError as error:
        if "vmem" not in str(error):
            raise
        return False
    return True


def tune(
    topology: Topology, case: Case, key: Key, candidates: list[dict[str, int]]
) -> dict[str, int] | None:
    """The cheapest candidate for one (op, key) that compiles; None if none does."""
    costs = []
    for blocks in candidates:
        try:
            with tuning.trying({key: blocks}):
                costs.append((cost(topology, case, blocks), blocks))
        except (ValueError, ZeroDivisionError):
            continue  # not a block of this shape
    for _, blocks in sorted(costs, key=lambda c: c[0]):
        with tuning.trying({key: blocks}):
            if fits(topology, case):
                return blocks
    return None


def timed(case: Case, key: Key, candidates: list[dict[str, int]]) -> dict[str, int] | None:
    """The fastest candidate for one (op, key) on the device at hand; None if none runs."""
    sets = [kernels.inputs(case.arguments, seed) for seed in range(2)]
    taken = []
    for blocks in candidates:
        with tuning.trying({key: blocks}):
            # A new function each time: jax.jit would take the program of the candidate before.
            run = functools.partial(case.variants[OURS])
            try:
                seconds = kernels.seconds_of({OURS: run}, sets, rounds=5)[OURS]
            except Exception as error:  # whatever a compiler says of blocks that it cannot take
                print(f"  {blocks}: {type(error).__name__}", flush=True)
                continue
        taken.append((seconds, blocks))
    return min(taken, key=lambda t: t[0])[1] if taken else None


def keys_of(case: Case, trace: Callable[[], Any], known: dict[str, Any]) -> list[Key]:
    """Which (op, key) a case asks for, less those already known."""
    with tuning.trying({}) as asked:
        trace()
        return [key for key in dict.fromkeys(asked) if key[1] not in known]


def save(op: str, found: dict[str, dict[str, Any]], how: str) -> None:
    """What was found, beside what the file has of other devices."""
    path = ROOT / "kernels_pallas" / op / "tuned.json"
    before = json.loads(path.read_text())["blocks"] if path.exists() else {}
    blocks = {**before, **{kind: keys for kind, keys in found.items() if keys}}
    path.write_text(json.dumps({"how": how, "blocks": blocks}, indent=1) + "\n")


def on_the_device(ops: list[str]) -> None:
    kind = jax.devices()[0].device_kind
    names = ["GPU_CANDIDATES"] if jax.default_backend() == "gpu" else ["TIMED_CANDIDATES"]
    for op in ops:
        bench = importlib.import_module(f"kernels_pallas.{op}.bench")
        candidates = next(getattr(bench, n) for n in (*names, "CANDIDATES") if hasattr(bench, n))
        known: dict[str, Any] = {}
        for case in bench.cases():
            trace = functools.partial(jax.make_jaxpr(case.variants[OURS]), *case.arguments)
            for key in keys_of(case, trace, known):
                known[key[1]] = timed(case, key, candidates)
                print(f"{op:14}{key[1]:44}{known[key[1]]}", flush=True)
        found = {k: v for k, v in known.items() if v}
        save(op, {kind: found}, f"python -m benchmarks.tune_kernels: timed on {kind}")


def ahead_of_time(ops: list[str], slices: list[str]) -> None:
    for op in ops:
        bench = importlib.import_module(f"kernels_pallas.{op}.bench")
        if not hasattr(bench, "CANDIDATES"):
            continue
        found: dict[str, dict[str, Any]] = {}
        for name in slices:
            topology = slice_topology(name)
            kind = found.setdefault(topology.devices[0].device_kind, {})
            for case in bench.cases():
                for key in keys_of(case, functools.partial(moved, topology, case), kind):
                    blocks = tune(topology, case, key, bench.CANDIDATES)
                    print(f"{op:14}{name:12}{key[1]:44}{blocks}", flush=True)
                    if blocks:
                        kind[key[1]] = blocks
        save(op, found, HOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=OPS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    flags = parser.parse_args()
    if jax.default_backend() != "cpu":
        on_the_device(list(flags.ops))
    else:
        ahead_of_time(list(flags.ops), list(flags.slices))


if __name__ == "__main__":
    main()
