"""The predicted step of every configuration as shipped, on a slice of every TPU generation.

    python -m benchmarks.predicted                       # all that is missing: many hours
    python -m benchmarks.predicted --config engram27b --slice v5p:4x4x8
    python -m benchmarks.predicted --config engram27b-4-layers --slice v5p:4x4x8 --again
    python -m benchmarks.predicted --table

Needs no TPU. Each is compiled by `launch.py --mode=compile` in a process of its own, which takes
minutes and gigabytes. A record is stored as soon as it is there, and the same command goes on with
what is missing under the installed jax and libtpu. CI compiles SHORT and compares it with its
record (tests/aot/test_compile_step.py), so that a slower step is seen in review; --again replaces
the record. The seconds are a model (engram_jax/aot/predict.py), not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.meshes import stored, versions
from engram_jax.hardware.storage import write_text

DEFAULT = harness.ROOT / "benchmarks" / "results" / "predicted.json"
SHORT = ("engram27b-4-layers", "v5p:4x4x8")
OVERRIDES: dict[str, dict[str, Any]] = {
    name: {} for name in ("engram27b", "engram40b", "moe27b", "dense4b")
} | {
    "engram27b-4-layers": {
        "model.layers": 4,
        "model.engram.layers": (1,),
        "train.accumulation": 10,
    }
}
SLICES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4")
CASES = (SHORT, *((name, s) for name in OVERRIDES if name != SHORT[0] for s in SLICES))
ALLOWED = 0.03  # of the stored seconds: how much slower a step may become unseen
GIB = 1 << 30


def flags_of(case: tuple[str, str]) -> list[str]:
    """What follows `launch.py`."""
    name, slice_name = case
    file = harness.ROOT / "configs" / f"{name.partition('-')[0]}.py"
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES[name].items()]
    flags = [f"--config={file}", "--mode=compile", f"--topology={slice_name}", "--json"]
    return [*flags, *overrides]


def record_of(case: tuple[str, str], report: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a report of `--mode=compile --json`."""
    kept = ("fits", "peak_hbm_bytes", "hbm_capacity_bytes", "compile_seconds", "mesh")
    record = {"config": case[0], "slice": case[1], **versions()}
    record |= {key: report[key] for key in (*kept, "accumulation", "global_batch_tokens")}
    return record | {"predicted": report.get("predicted")}


def find(records: list[dict[str, Any]], case: tuple[str, str]) -> dict[str, Any] | None:
    """The record of a case under the installed jax and libtpu."""
    wanted = {"config": case[0], "slice": case[1], **versions()}
    return next((r for r in records if wanted.items() <= r.items()), None)


def slower(before: dict[str, Any], now: dict[str, Any], allowed: float = ALLOWED) -> str:
    """Why a step is predicted slower than its record, in one line; "" if it is not.

    before, now: `predicted` of either.
    """
    growth = max(b / a for a, b in zip(before["seconds"], now["seconds"], strict=True)) - 1
    if growth <= allowed:
        return ""
    parts = {
        name: now["by_part"][name][1] - seconds[1] for name, seconds in before["by_part"].items()
    }
    grown = sorted((p for p in parts.items() if p[1] > 0), key=lambda p: -p[1])
    told = ", ".join(f"{name} +{seconds:.3g} s" for name, seconds in grown)
    old = {(p["name"], *p["lines"]) for p in before["places"]}
    new = [p for p in now["places"] if (p["name"], *p["lines"]) not in old]
    where = f"; new among the costliest: {' < '.join(new[0]['lines'])}" if new else ""
    return (
        f"the step is predicted {growth:.1%} slower than the record, more than {allowed:.0%}:"
        f" {told}{where}; if that is meant, store it (benchmarks/predicted.py --again)"
    )


def compile_case(case: tuple[str, str]) -> dict[str, Any] | None:
    """The report; None, with its message, if the process breaks. Status 1 is one that does not
    fit."""
    done = subprocess.run(
        [sys.executable, "launch.py", *flags_of(case)],
        cwd=harness.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode and not done.stdout.startswith("{"):
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"{case[0]}: status {done.returncode}: {said[0]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout)


def sweep(cases: list[tuple[str, str]], path: Path, *, again: bool = False) -> bool:
    """Compile what is missing in the file; whether nothing is missing after it."""
    complete = True
    for case in cases:
        if find(stored(path), case) and not again:
            continue
        print(f"compiling {case[0]} on {case[1]}", file=sys.stderr, flush=True)
        report = compile_case(case)
        if report is None:
            complete = False
            continue
        records = stored(path)
        replaced = find(records, case)
        records = [r for r in records if r != replaced] + [record_of(case, report)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"records": records}, indent=1) + "\n")
    return complete


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, in the order of CASES."""
    lines = [
        "| configuration | slice | peak of HBM, GiB | step, s | tokens/s | utilisation, %"
        " | communication exposed, s |",
        "|---|---|---|---|---|---|---|",
    ]

    def between(values: list[float], form: str) -> str:
        return " .. ".join(format(v, form) for v in values)

    order = {case: n for n, case in enumerate(CASES)}
    for r in sorted(records, key=lambda r: order.get((r["config"], r["slice"]), len(order))):
        peak = f"{r['peak_hbm_bytes'] / GIB:.1f} of {r['hbm_capacity_bytes'] / GIB:.1f}"
        found = r["predicted"]
        start = f"| {r['config']} | {r['slice']} | {peak} |"
        if not found:
            lines.append(f"{start} does not fit | | | |")
            continue
        exposed = between(found["overlap"]["collectives"]["exposed_s"][::-1], ".2f")
        lines.append(
            f"{start} {between(found['seconds'], '.2f')}"
            f" | {between(found['tokens_per_s'], ',.0f')}"
            f" | {between([100 * u for u in found['utilisation']], '.0f')} | {exposed} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=list(OVERRIDES), help="default: all")
    parser.add_argument("--slice", help="default: all")
    parser.add_argument("--json", type=Path, default=DEFAULT, metavar="PATH")
    parser.add_argument("--again", action="store_true", help="replace what is there")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    flags = parser.parse_args()
    cases = [
        case for case in CASES if flags.config in (None, case[0]) and flags.slice in (None, case[1])
    ]
    if not cases:
        known = "; ".join(f"{name} on {slice_name}" for name, slice_name in CASES)
        parser.error(f"no case of {flags.config or 'any'} on {flags.slice}: there are {known}")
    complete = flags.table or sweep(cases, flags.json, again=flags.again)
    print(table([r for r in stored(flags.json) if (r["config"], r["slice"]) in cases]))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
