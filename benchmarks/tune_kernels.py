"""Block sizes for every TPU generation: the cheapest that the compiler accepts.

    python -m benchmarks.tune_kernels            # all ops that declare CANDIDATES, all generations
    python -m benchmarks.tune_kernels --ops engram_gate --slices v5p:2x2x1

No TPU is at hand, so nothing is timed: candidates are ordered by a roofline (bytes that the kernel
moves / bandwidth against products / peak, the latter less for blocks narrower than the matrix
unit; ties go to fewer bytes, then to wider blocks), and the first that fits VMEM wins. Writes
kernels_pallas/<op>/tuned.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks.kernels_aot import BANDWIDTH, OPS, SLICES
from engram_jax.aot.one_chip import compile_operation
from engram_jax.aot.topology import Topology, slice_topology
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
    generation, found = topology.generation, moved(topology, case)
    busy = min(1.0, blocks.get("columns", 256) / MATRIX_UNIT[generation])
    products = case.flops / (topology.peak_flops * busy)
    return max(found / BANDWIDTH[generation], products), found, -blocks.get("columns", 0)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=OPS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    flags = parser.parse_args()
    for op in flags.ops:
        bench = importlib.import_module(f"kernels_pallas.{op}.bench")
        if not hasattr(bench, "CANDIDATES"):
            continue
        found: dict[str, dict[str, Any]] = {}
        for name in flags.slices:
            topology = slice_topology(name)
            kind = found.setdefault(topology.devices[0].device_kind, {})
            for case in bench.cases():
                with tuning.trying({}) as asked:
                    moved(topology, case)
                    keys = [key for key in dict.fromkeys(asked) if key[1] not in kind]
                for key in keys:
                    blocks = tune(topology, case, key, bench.CANDIDATES)
                    print(f"{op:14}{name:12}{key[1]:44}{blocks}", flush=True)
                    if blocks:
                        kind[key[1]] = blocks
        path = ROOT / "kernels_pallas" / op / "tuned.json"
        path.write_text(json.dumps({"how": HOW, "blocks": found}, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
