"""Candidate meshes of a configuration on a TPU slice, compiled and their steps predicted.

    python -m benchmarks.meshes --config engram27b --slice v5p:4x4x8 \\
        --json benchmarks/results/meshes.json
    python -m benchmarks.meshes --config engram27b --slice v5p:4x4x8 --only "fsdp128 acc1"
    python -m benchmarks.meshes --config engram27b --slice v5p:4x4x8 --table

Needs no TPU; a model of this size takes minutes and gigabytes for each candidate, which is compiled
in a process of its own, as `launch.py --mode=compile` does (but without looking for a larger slice
where it does not fit). A result is stored as soon as it is there, and the same command goes on with
what is missing under the installed jax and libtpu. The times are predictions
(engram_jax/aot/predict.py), to compare candidates by.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.errors import JaxRuntimeError

from benchmarks import harness
from engram_jax.aot.predict import predict, rounded
from engram_jax.aot.predict_report import expected_rounds
from engram_jax.aot.topology import parse_topology
from engram_jax.config import Config, parse_config
from engram_jax.config.errors import UserError
from engram_jax.hardware.storage import write_text

GIB = 1 << 30
DEFAULT = harness.ROOT / "benchmarks" / "results" / "meshes.json"
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
KEY = ("config", "slice", "candidate", "jax", "libtpu")


@dataclass(frozen=True)
class Candidate:
    """Devices along each axis of a mesh, and the microbatches of a step."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    accumulation: int = 1

    @property
    def _axes(self) -> list[tuple[str, int]]:
        sizes = [(name, getattr(self, name)) for name in AXES]
        return [(k, n) for k, n in sizes if n > 1]

    @property
    def name(self) -> str:
        """ "fsdp 16 x expert 8, 2 microbatches"."""
        parts = f"{self.accumulation} microbatch{'es' if self.accumulation > 1 else ''}"
        return f"{' x '.join(f'{k} {n}' for k, n in self._axes)}, {parts}"

    @property
    def short(self) -> str:
        """ "fsdp16xexpert8 acc2"."""
        return f"{'x'.join(f'{k}{n}' for k, n in self._axes)} acc{self.accumulation}"

    def of(self, config_name: str) -> Config:
        """The configuration with this mesh."""
        config = importlib.import_module(f"configs.{config_name}").get_config()
        for axis in AXES:
            config.mesh[axis] = getattr(self, axis)
        config.train.accumulation = self.accumulation
        return parse_config(config)


# The paper's batch is 1280 sequences: 10 for each of 128 devices, 5 for each of 256.
_EXPERTS_128 = (
    Candidate(fsdp=16, expert=8, accumulation=2),
    Candidate(fsdp=16, expert=8),
    Candidate(fsdp=32, expert=4),
    Candidate(fsdp=64, expert=2),
    Candidate(fsdp=128),
    Candidate(fsdp=128, accumulation=2),
    Candidate(data=2, fsdp=64),
)
_EXPERTS_256 = (
    Candidate(fsdp=256, accumulation=5),
    Candidate(fsdp=256),
    Candidate(data=2, fsdp=128, accumulation=5),
    Candidate(data=2, fsdp=128),
    Candidate(fsdp=128, expert=2, accumulation=5),
    Candidate(fsdp=32, expert=8, accumulation=5),
)
_DENSE_128 = (
    Candidate(fsdp=128),
    Candidate(fsdp=128, accumulation=2),
    Candidate(fsdp=64, tensor=2),
    Candidate(data=2, fsdp=64),
    Candidate(data=4, fsdp=32),
)
_DENSE_256 = (
    Candidate(fsdp=256, accumulation=5),
    Candidate(fsdp=256),
    Candidate(fsdp=128, tensor=2, accumulation=5),
    Candidate(data=2, fsdp=128, accumulation=5),
    Candidate(data=4, fsdp=64, accumulation=5),
)
CANDIDATES: dict[tuple[str, str], tuple[Candidate, ...]] = {
    **{(name, "v5p:4x4x8"): _EXPERTS_128 for name in ("engram27b", "engram40b", "moe27b")},
    **{
        (name, slice_name): _EXPERTS_256
        for name in ("engram27b", "moe27b")
        for slice_name in ("v5e:16x16", "v6e:16x16")
    },
    ("dense4b", "v5p:4x4x8"): _DENSE_128,
    **{("dense4b", slice_name): _DENSE_256 for slice_name in ("v5e:16x16", "v6e:16x16")},
    # To try this program in minutes; a sequence of the demo is too short for conclusions.
    ("engram_tiny", "v5e:2x2"): (
        Candidate(fsdp=4),
        Candidate(fsdp=4, accumulation=2),
        Candidate(fsdp=2, expert=2),
        Candidate(expert=4),
        Candidate(data=2, fsdp=2),
    ),
}


def shipped(config_name: str, slice_name: str) -> Candidate:
    """The mesh that the file of the configuration asks for, on that slice."""
    config = parse_config(importlib.import_module(f"configs.{config_name}").get_config())
    generation, size = parse_topology(slice_name)
    mesh, devices = config.mesh, math.prod(size) * generation.devices_per_chip
    fsdp = mesh.fsdp or devices // (mesh.data * mesh.expert * mesh.sequence * mesh.tensor)
    axes = mesh.data, fsdp, mesh.expert, mesh.sequence, mesh.tensor
    return Candidate(*axes, config.train.accumulation)


def compile_candidate(config_name: str, slice_name: str, candidate: Candidate) -> dict[str, Any]:
    """The record of one candidate, compiled in this process."""
    from engram_jax.aot.compile_step import compile_step

    label = {"config": config_name, "slice": slice_name, "candidate": candidate.name, **versions()}
    with tempfile.TemporaryDirectory(prefix="engram_mesh_") as folder:
        try:
            config = candidate.of(config_name)
            report = compile_step(config, slice_name, dump=Path(folder))
        except (UserError, JaxRuntimeError) as error:
            return label | {"fits": False, "message": str(error).splitlines()[0]}
        tokens = report["global_batch_tokens"] / report["devices"]
        record = label | {
            "fits": report["fits"],
            "peak_hbm_bytes": report["peak_hbm_bytes"],
            "hbm_capacity_bytes": report["hbm_capacity_bytes"],
            "compile_seconds": report["compile_seconds"],
            "tokens_per_device": tokens,
        }
        texts = list(Path(folder).glob("*.after_codegen.txt"))
        if not report["fits"] or not texts:
            return record | {"message": report.get("message", "does not fit")}
        unknown = expected_rounds(config)
        # The rounds of the row exchange beyond the first do not run in a step as planned.
        found = predict(
            texts[0].read_text(), slice_name, tokens=tokens, unknown=unknown, overflow=0
        )
        return record | {"chunks": unknown, "prediction": rounded(found)}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in KEY)


def stored(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["records"] if path.exists() else []


def store(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the file; an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"records": [*stored(path), record]}, indent=1) + "\n")


def compile_in_a_process(
    config_name: str, slice_name: str, candidate: Candidate
) -> dict[str, Any] | None:
    """`compile_candidate` in a process of its own; None, with its message, if that one breaks."""
    command = [sys.executable, "-m", "benchmarks.meshes", "--config", config_name]
    command += ["--slice", slice_name, "--child", candidate.name]
    done = subprocess.run(
        command,
        cwd=harness.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"{candidate.name}: status {done.returncode}: {said[0]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def sweep(config_name: str, slice_name: str, only: str, path: Path) -> bool:
    """Compile what is missing in the file; whether nothing is missing after it."""
    known, complete = {key(record) for record in stored(path)}, True
    chosen = [c for c in CANDIDATES[config_name, slice_name] if only in c.name or only in c.short]
    if not chosen:
        raise UserError(f"--only {only!r}: no candidate has this in its name")
    for candidate in chosen:
        label = {"config": config_name, "slice": slice_name, "candidate": candidate.name}
        if key(label | versions()) in known:
            continue
        print(f"compiling {config_name} on {slice_name}: {candidate.name}", file=sys.stderr)
        record = compile_in_a_process(config_name, slice_name, candidate)
        if record is None:
            complete = False
        else:
            store(path, record)
    return complete


def table(records: list[dict[str, Any]], mark: str) -> str:
    """Markdown, fastest first by the lower sum; what has no prediction comes last.

    mark: the name of the shipped candidate.
    """
    lines = [
        "| candidate | peak of HBM, GiB | step, s | matmul, s | elementwise, s | kernels, s"
        " | collectives, s | received, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def order(record: dict[str, Any]) -> tuple[float, str]:
        return record.get("prediction", {}).get("sum_s", math.inf), record["candidate"]

    for record in sorted(records, key=order):
        name = record["candidate"] + (" (shipped)" if record["candidate"] == mark else "")
        peak = "–"
        if record.get("peak_hbm_bytes"):
            sizes = record["peak_hbm_bytes"] / GIB, record["hbm_capacity_bytes"] / GIB
            peak = f"{sizes[0]:.1f} of {sizes[1]:.1f}"
        found = record.get("prediction")
        if not found:
            why = record["message"].replace("|", "/") if peak == "–" else "does not fit"
            lines.append(f"| {name} | {peak} | {why} | | | | | |")
            continue
        lines.append(
            f"| {name} | {peak} | {found['sum_s']:.2f} .. {found['sum_upper_s']:.2f}"
            f" | {found['matmul_s']:.2f}"
            f" | {found['elementwise_lower_s']:.2f} .. {found['elementwise_upper_s']:.2f}"
            f" | {found['kernels_s']:.2f} | {found['collectives_s']:.2f}"
            f" | {found['collectives_total_GB']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="a name under configs/")
    parser.add_argument("--slice", required=True)
    parser.add_argument("--json", type=Path, default=DEFAULT, metavar="PATH")
    parser.add_argument("--only", default="", help='part of a name: "fsdp128 acc1"')
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the candidate to compile right here
    flags = parser.parse_args()
    candidates = CANDIDATES.get((flags.config, flags.slice))
    if candidates is None:
        known = "; ".join(f"{config} on {name}" for config, name in CANDIDATES)
        parser.error(f"no candidates of {flags.config} on {flags.slice}: there are {known}")
    if flags.child:
        (candidate,) = (c for c in candidates if c.name == flags.child)
        print(json.dumps(compile_candidate(flags.config, flags.slice, candidate)))
        return 0
    try:
        complete = flags.table or sweep(flags.config, flags.slice, flags.only, flags.json)
    except UserError as error:
        parser.error(str(error))
    now = tuple(versions().values())
    mine = (flags.config, flags.slice)
    records = [
        r for r in stored(flags.json) if key(r)[:2] == mine and (flags.table or key(r)[3:] == now)
    ]
    latest = {r["candidate"]: r for r in records}
    print(table(list(latest.values()), shipped(flags.config, flags.slice).name))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
