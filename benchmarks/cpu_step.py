"""The demo's training step and its base model's on this CPU, beside torch and an earlier commit.

    python -m benchmarks.cpu_step [--torch PYTHON] [--before CHECKOUT] [--json PATH]

base   configs/moe_tiny.py with one residual stream and AdamW: no Engram module, no mHC to speak of,
       no Muon. torch runs the same sizes (benchmarks/torch_step.py, which says how to install it).
demo   configs/engram_tiny.py, the whole step.

--torch: the Python of an environment with torch and transformers; it runs as it is and with the
allocator's huge pages, which launch.py sets for us (engram_jax/hardware/huge_pages.py), and the
faster one counts. --before: another checkout of this repository, run with this environment's
packages and as its own launch.py would be. Every program is a process of its own; they take turns
of a few steps, the others waiting for their input, so whatever else the machine does meets all of
them. A turn's first steps do not count: a virtual machine may have given the memory that a program
freed back to its host meanwhile, which a run without pauses never meets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Figure, Result

TUNABLE = "glibc.malloc.hugetlb"  # not imported: earlier commits have no module for it

MODELS = ("base", "demo")
ROUNDS, UNCOUNTED, COUNTED = 16, 3, 6  # turns of each program; a turn's steps


def work(model: str) -> None:
    """For every line of standard input one step, and its seconds; first, those of compiling."""
    import dataclasses

    import optax

    from benchmarks.demo_model import Training, batches, demo_config, demo_program
    from configs import moe_tiny
    from engram_jax.config import parse_config

    if model == "demo":
        program = demo_program(demo_config())
    else:
        config = moe_tiny.get_config()
        config.model.hyper.streams = 1
        program = demo_program(parse_config(config))
        keys = program.config.optimizer
        adamw = optax.adamw(
            program.rate, b1=keys.adam_b1, b2=keys.adam_b2, weight_decay=keys.weight_decay
        )
        program = dataclasses.replace(program, tx=adamw)
    start = time.perf_counter()
    training = Training(program, batches(program.config))
    training()
    print(time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        training()
        print(time.perf_counter() - start, flush=True)


def allocate_as_launched() -> None:
    """What the launch.py of these packages does about huge pages: nothing in earlier commits."""
    with contextlib.suppress(ImportError):
        from engram_jax.hardware.huge_pages import restart_with_huge_pages

        restart_with_huge_pages()


class Worker:
    """A process that makes a step when asked. first: its first line; folder: of its packages."""

    def __init__(
        self,
        python: str,
        file: Path,
        arguments: Sequence[str] = (),
        folder: Path | None = None,
        tunables: str = "",
    ):
        # -P: the script's own folder is not searched; its kernels.py would hide other packages.
        paths = {"PYTHONPATH": str(folder)} if folder else {}
        self.process = subprocess.Popen(
            [python, "-P", str(file), *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": tunables} | paths,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._line()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.process.args!r}: ended")
        return line

    def turn(self) -> float:
        """Seconds of a step: the median of some, after some more."""
        steps = [self.step() for _ in range(UNCOUNTED + COUNTED)]
        return statistics.median(steps[UNCOUNTED:])

    def step(self) -> float:
        """Seconds of one more step."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())


def measure(torch: Path | None, before: Path | None) -> Result:
    file = Path(__file__).resolve()
    folders = {"": harness.ROOT} | ({"before, ": before.resolve()} if before else {})
    workers = {
        prefix + model: Worker(sys.executable, file, ["--worker", model], folder)
        for model in MODELS
        for prefix, folder in folders.items()
    }
    details: dict[str, object] = {
        "compile_seconds": {name: float(worker.first) for name, worker in workers.items()}
    }
    theirs = {"torch, base": "", "torch, base, huge pages": f"{TUNABLE}=1"} if torch else {}
    for name, tunables in theirs.items():
        workers[name] = Worker(str(torch), file.with_name("torch_step.py"), tunables=tunables)
        details["torch"] = workers[name].first
    rounds = [{k: w.turn() for k, w in workers.items()} for _ in range(ROUNDS)]
    seconds = {name: [one[name] for one in rounds] for name in workers}

    def ratio(ours: str, theirs: str) -> float:
        """The median over rounds, whose turns took place side by side."""
        return statistics.median(one[ours] / one[theirs] for one in rounds)

    figures = [Figure(k, 1e3 * statistics.median(s), "ms") for k, s in seconds.items()]
    if torch:
        faster = min(theirs, key=lambda name: statistics.median(seconds[name]))
        figures.append(Figure("base to torch", ratio("base", faster), "x", at_most=1.0))
    if before:
        figures.append(Figure("base to before", ratio("base", "before, base"), "x"))
        figures.append(Figure("demo to before", ratio("demo", "before, demo"), "x", at_most=0.75))
    details["seconds"] = seconds
    setting = f"16 x 128 tokens a step, float32; medians of {ROUNDS} turns of {COUNTED} steps"
    return Result("cpu_step", setting, figures, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", type=Path, metavar="PYTHON")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args()
    if flags.worker:
        allocate_as_launched()
        work(flags.worker)
    else:
        harness.main(lambda: measure(flags.torch, flags.before), rest)


if __name__ == "__main__":
    main()
