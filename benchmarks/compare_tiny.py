"""engram_tiny against moe_tiny: same parameters, same FLOPs, several seeds, held-out loss.

    python -m benchmarks.compare_tiny --out=runs/compare --json=benchmarks/results/compare_tiny.json

Each run is a `launch.py` of its own with --config.train.seed and --config.data.seed set, two at a
time, one core each; a run that is complete is not run again. Further flags are handed on:

    python -m benchmarks.compare_tiny --models engram_tiny --out=runs/bfloat16 \\
        --config.model.engram.table_dtype=bfloat16
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import jax

from engram_jax.config import parse_config
from engram_jax.model.describe import describe

MODELS = ("engram_tiny", "moe_tiny")


def run(model: str, seed: int, out: Path, core: int, extra: list[str]) -> dict[str, Any]:
    """Train (or find) one run; returns its held-out loss, and what text that is of."""
    workdir = out / f"{model}_{seed}"
    command = [
        *("taskset", "-c", str(core), sys.executable, "launch.py"),
        *(f"--config=configs/{model}.py", f"--workdir={workdir}"),
        *(f"--config.train.seed={seed}", f"--config.data.seed={seed}", *extra),
    ]
    with (out / f"{model}_{seed}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    losses = json.loads((workdir / "losses.json").read_text())
    loss = losses["held_out_loss"]["nats_per_token"][model]
    return {"name": model, "seed": seed, "loss": loss, "text": losses["data"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    known, extra = parser.parse_known_args()
    known.out.mkdir(parents=True, exist_ok=True)
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def job(pair: tuple[str, int]) -> dict[str, Any]:
        core = cores.get()
        try:
            return run(*pair, known.out, core, extra)
        finally:
            cores.put(core)

    pairs = [(model, seed) for seed in range(known.seeds) for model in known.models]
    with ThreadPoolExecutor(cores.qsize()) as pool:
        results = list(pool.map(job, pairs))

    texts = {r["text"]["digest"]: r["text"] for r in results}
    if len(texts) > 1:
        raise SystemExit(f"runs on different texts, {', '.join(texts)}: give another --out")
    (text,) = texts.values()
    print(f"{text['source']}, digest {text['digest']}")
    table = {}
    for model in known.models:
        losses = [r["loss"] for r in results if r["name"] == model]
        facts = describe(parse_config(importlib.import_module(f"configs.{model}").get_config()))
        table[model] = {
            "total_params": facts["total_params"],
            "flops_per_token": facts["flops_per_token"],
            "losses": losses,
            "mean": statistics.mean(losses),
            "stdev": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        }
        row = table[model]
        print(
            f"{model:12} {row['total_params']:>10,} parameters {row['flops_per_token']:.4g}"
            f" FLOPs/token  held-out {row['mean']:.4f} +- {row['stdev']:.4f}  {losses}"
        )
    if known.json:
        known.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "jax": jax.__version__}
        found = {"machine": machine, "text": text, "models": table}
        known.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
