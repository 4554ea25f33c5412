"""Random kills in one run, and whether its loss curve is the undisturbed run's, bit for bit.

    python -m benchmarks.kills [--kills N] [--seed N] [--json PATH]

--json=/dev/stdout prints the JSON object.

The small model of the tests, 180 steps, a checkpoint every third. Every launch is a process, ended
by SIGKILL or SIGTERM (sometimes twice) while starting, stepping or saving.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Figure, Result

STEPS = 180
RUN = {"train__steps": STEPS, "train__eval_every": 12, "optimizer__peak_lr": 3e-3}


def measure(kills: int = 20, seed: int = 0) -> Result:
    from engram_jax.checkpoint import run_record
    from engram_jax.monitoring import goodput
    from engram_jax.monitoring.metrics import read_metrics
    from tests.kills import assert_same_run, campaign, start
    from tests.runs import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        corpus, expected, workdir = base / "text", base / "undisturbed", base / "run"
        write_corpus(corpus)

        def finish(where: Path) -> None:
            process = start(corpus, where, **RUN)
            _, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err)

        began = time.perf_counter()
        finish(expected)
        done = []
        for kill in campaign(corpus, workdir, kills, random.Random(seed), **RUN):
            done.append(kill)
            print(f"{len(done)}/{kills} {kill}", flush=True)
        finish(workdir)
        seconds = time.perf_counter() - began
        curves = [
            [(r["step"], r["loss"]) for r in read_metrics(where) if "loss" in r]
            for where in (workdir, expected)
        ]
        try:
            assert_same_run(corpus, workdir, expected)
            everything = True
        except AssertionError:
            everything = False
        launches = run_record.read_launches(workdir / "run.json")
        spent = goodput.read(workdir)
    different = sum(a != b for a, b in zip(*curves, strict=False))
    different += abs(len(curves[0]) - len(curves[1]))
    of = Counter(kill.signal for kill in done)
    forced = [kill for kill in done if kill.within_save]
    share = sum(x["training_seconds"] for x in spent) / sum(x["seconds"] for x in spent)
    note = f"{of['SIGKILL']} SIGKILL, {of['SIGTERM']} SIGTERM ({sum(k.again for k in done)} twice)"
    return Result(
        "kills",
        f"{kills} random kills in one run of {STEPS} steps, seed {seed}",
        [
            Figure("kills", len(done), "", at_least=kills, note=note),
            Figure("of them within a save", len(forced), "", at_least=kills / 8),
            Figure("steps whose loss differs", different, f"of {STEPS}", at_most=0),
            Figure("everything else is the same, too", float(everything), "", at_least=1),
            Figure("goodput", share, "", note="a step takes milliseconds, a start seconds"),
            Figure("all of it", seconds, "s"),
        ],
        {
            "kills": [asdict(kill) for kill in done],
            "resumed_at": [launch["resumed_at"] for launch in launches],
            "loss": [loss for _, loss in curves[0]],
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    harness.main(lambda: measure(options.kills, options.seed), rest)
