"""Pallas kernels against XLA, compiled for one chip of every TPU generation: memory and traffic.

    python -m benchmarks.kernels_aot --json=benchmarks/results/kernels_tpu_aot.json
    python -m benchmarks.kernels_aot --only "engram_gate engram27b" --slices v5p:2x2x1

Needs no TPU: libtpu compiles ahead of time. Of each operation: bytes moved through HBM (a kernel's
from its grid, XLA's from the operands and results of every instruction), in units of the floor, the
temporary memory, and the VMEM that the kernel uses. "bound" says what the floor's time is made of:
bytes / bandwidth or FLOPs / peak, whichever is longer (published peaks).
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import jax

from engram_jax.aot.one_chip import compile_operation
from engram_jax.aot.topology import slice_topology
from engram_jax.hardware.generations import GENERATIONS
from kernels_pallas.cases import Case

OPS = ("engram_gate", "short_conv", "mhc")
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
NATIVE_FP8 = ("tpu7x",)  # twice the bfloat16 rate; elsewhere e4m3 is multiplied as bfloat16


def measure(case: Case, name: str) -> dict[str, Any]:
    """Of one case on one slice: floor and, for every variant, bytes, temporaries and VMEM."""
    topology = slice_topology(name)
    generation, bandwidth = topology.generation, GENERATIONS[topology.generation].hbm_bandwidth
    rate = topology.peak_flops * (2 if case.fp8 and generation in NATIVE_FP8 else 1)
    seconds = {"bytes": case.bytes / bandwidth, "FLOPs": case.flops / rate}
    bound = max(seconds, key=lambda k: seconds[k])
    found: dict[str, Any] = {
        "floor_bytes": case.bytes,
        "flops": case.flops,
        "bound": bound,
        "floor_us": round(seconds[bound] * 1e6, 1),
    }
    for label, function in case.variants.items():
        operation = compile_operation(topology, function, *case.arguments)
        found[label] = {
            "bytes": operation.bytes,
            "temp_bytes": operation.memory.temp,
            "vmem_bytes": operation.vmem,
            "moving_us": round(operation.bytes / bandwidth * 1e6, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of an op's and a case's name")
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':58}{'bytes / floor':>16}{'temp, MB':>18}{'VMEM, MiB':>11}")
    print(
        f"{'operation':46}{'slice':12}{'XLA':>8}{'ours':>8}{'XLA':>9}{'ours':>9}{'ours':>11}  bound"
    )
    for op in OPS:
        for case in importlib.import_module(f"kernels_pallas.{op}.bench").cases():
            label = f"{op} {case.name}"
            if flags.only not in label:
                continue
            results[label] = {}
            for name in flags.slices:
                found = results[label][name] = measure(case, name)
                xla, ours = found["XLA"], found["ours"]
                print(
                    f"{label:46}{name:12}"
                    f"{xla['bytes'] / case.bytes:8.2f}{ours['bytes'] / case.bytes:8.2f}"
                    f"{xla['temp_bytes'] / 1e6:9.1f}{ours['temp_bytes'] / 1e6:9.1f}"
                    f"{ours['vmem_bytes'] / 2**20:11.1f}  {found['bound']}",
                    flush=True,
                )
    if flags.json:
        versions = {name: importlib.import_module(name).__version__ for name in ("jax", "libtpu")}
        flags.json.write_text(
            json.dumps({"versions": versions, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
