"""Mutation testing: a fault is put into a module, and its tests must notice (`make mutate`).

A runner of our own, over the standard library's `ast`, because those that are kept up do not fit:
mutmut 3.8 draws no sample, leaves out properties and statements, and learns which test covers what
from the calls that each makes, which under JAX the first test that traces a function makes for all
later ones; by default it forks after JAX has run, and hangs. cosmic-ray edits the checkout and runs
all tests for each mutant in a process of its own.

For the same reason the covering tests are not measured but stand in `COVERING`, file by file: line
coverage under tracing and in the subprocesses of tests names too few. Every mutant meets them
fastest first until one fails. They run in a child of this process, which has imported JAX but not
used it (so has one thread, and may fork), on a copy of the tree in .mutate/, one for each module.

Results are kept in .mutate/NAME.jsonl by the module's digest: an interrupted run goes on where it
was, and when tests have changed only what survived is tried again. Survivors that no test should
kill stand in tests/mutants_excused.toml with the reason; they count as survivors all the same.

Exit status: 0; 1 if fewer than 85 % were noticed or a survivor is not excused; 2 if time ran out
(run it again to go on); 3 if the tests fail without a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}

from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutate"
EXCUSED = ROOT / "tests" / "mutants_excused.toml"
LEAST = 0.85
EIGHT = "--xla_force_host_platform_device_count=8"
BITS = EIGHT + " --xla_backend_optimization_level=3"  # as tests/test_eight_devices.py runs them


@dataclass(frozen=True)
class Tests:
    """One file of tests, or a test in it; XLA's flags; pytest's marker expression."""

    path: str
    flags: str = ""
    marker: str = "not slow"


COVERING = {
    "training/step": (
        Tests("tests/training/test_step.py"),
        Tests("tests/training/test_trained.py"),
        Tests("tests/eight/test_training.py", EIGHT),
    ),
    "training/updates": (
        Tests("tests/training/test_step.py"),
        Tests("tests/training/test_trained.py"),
        Tests("tests/eight/test_training.py", EIGHT),
    ),
    "memory/exchange": (
        Tests("tests/eight/test_exchange.py", BITS),
        Tests("tests/training/test_step.py"),
    ),
    "serve/scheduler": (
        Tests("tests/serve/test_scheduler.py"),
        Tests("tests/serve/test_engine.py"),
    ),
    "memory/row_gradients": (
        Tests("tests/memory/test_row_gradients.py"),
        Tests("tests/eight/test_exchange.py", BITS),
    ),
}
# Imported before the fork, as far as they are there: what the tests import of other people's code.
WARM = (
    "numpy jax flax.nnx optax pytest tokenizers ml_collections orbax.checkpoint grain.python numba"
)


def copy_tree(tree: Path) -> str:
    """The checkout as it is, without what git ignores; JAX's compiled programs in it are kept.
    Returns the digest of all its files."""
    for old in tree.iterdir() if tree.exists() else ():
        if old.name != ".pytest_cache":
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    digest = hashlib.sha256()
    for name in sorted(subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    (tree / ".venv").symlink_to(ROOT / ".venv")
    return digest.hexdigest()[:16]


def run(tree: Path, module: str, tests: Tests, limit: float) -> tuple[int | None, float, str]:
    """(pytest's exit status, None past `limit` seconds; seconds; the tests that failed)."""
    log, start = tree.parent / f"{tree.name}.log", time.monotonic()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has threads: a fork of it might hang")
    if (child := os.fork()) == 0:
        _child(tree, module, tests, log)
    end: int | None = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            end = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > start + limit:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # itself, and what its tests have left running
        os.killpg(child, signal.SIGKILL)
    if end is None:
        os.waitpid(child, 0)
    told = log.read_text(errors="replace").splitlines()
    failed = [x.split(" - ")[0] for x in told if x.startswith(("FAILED ", "ERROR "))]
    return end, time.monotonic() - start, failed[0] if failed else ""


def _child(tree: Path, module: str, tests: Tests, log: Path) -> None:
    """In the forked process: pytest, and out."""
    status = 1  # a module that cannot be imported is noticed
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        os.environ["XLA_FLAGS"] = tests.flags
        sys.argv = ["pytest"]
        import pytest

        loaded = importlib.import_module("engram_jax." + module.replace("/", "."))
        if not Path(loaded.__file__ or "").is_relative_to(tree):
            status = 4
        else:
            given = ["-x", "-q", "--tb=short", "-p", "no:xdist", "-m", tests.marker, tests.path]
            status = int(pytest.main(given))
    except BaseException as error:  # anything at import, SystemExit too
        print(f"ERROR at import: {type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(status)


def write(tree: Path, module: str, source: str) -> None:
    path = tree / "engram_jax" / f"{module}.py"
    path.write_text(source)
    # Python takes compiled code for current by the second and the size.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


class Results:
    """.mutate/NAME.jsonl: one verdict a line, of any version of the module and its tests."""

    def __init__(self, name: str, source: str, tests: tuple[Tests, ...]):
        self._path = KEPT / f"{name}.jsonl"
        self._module = hashlib.sha256(source.encode()).hexdigest()[:16]
        texts = b"".join((ROOT / t.path.split("::")[0]).read_bytes() for t in tests)
        self._tests = hashlib.sha256(texts + repr(tests).encode()).hexdigest()[:16]
        self.verdicts: dict[str, dict] = {}
        self.passed: dict[str, float] = {}  # seconds of the tests without a fault, by tree and file
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                one = json.loads(line)
            except ValueError:
                continue  # cut off when a run was stopped
            if one["verdict"] == "passed":
                self.passed[one["id"]] = one["seconds"]
                continue
            alive = one["verdict"] == "survived" and one["tests"] != self._tests
            if one["module"] == self._module and not alive:
                self.verdicts[one["id"]] = one

    def add(self, mutant: Mutant, verdict: str, seconds: float, by: str) -> None:
        one = {"id": mutant.id, "line": mutant.line, "verdict": verdict, "by": by}
        self.verdicts[mutant.id] = one | {"seconds": seconds}
        self._write(one, seconds)

    def add_passed(self, key: str, seconds: float) -> None:
        self.passed[key] = seconds
        self._write({"id": key, "verdict": "passed"}, seconds)

    def _write(self, one: dict, seconds: float) -> None:
        one = {"module": self._module, "tests": self._tests, **one, "seconds": round(seconds, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")


def judge(
    tree: Path, module: str, order: list[tuple[Tests, float]], changed: str
) -> tuple[str, float, str]:
    """(killed, timeout or survived; seconds; by what)."""
    write(tree, module, changed)
    total = 0.0
    for tests, usual in order:
        end, seconds, by = run(tree, module, tests, 30 + 4 * usual)
        total += seconds
        if end is None:
            return "timeout", total, tests.path
        if end != 0:
            return "killed", total, by or f"exit status {end} of {tests.path}"
    return "survived", total, ""


def excuses(module: str) -> dict[str, str]:
    """{mutant's id: reason}."""
    listed = tomllib.loads(EXCUSED.read_text()).get("excused", [])
    return {one["mutant"]: one["reason"] for one in listed if one["module"] == module}


def try_module(module: str, sample: int, seed: int, until: float) -> int:
    source = (ROOT / "engram_jax" / f"{module}.py").read_text()
    tests, name = COVERING[module], module.replace("/", ".")
    every = mutants(source)
    drawn = random.Random(seed).sample(every, min(sample, len(every)))
    results, tree = Results(name, source, tests), KEPT / name
    print(f"{module}: {len(drawn)} of {len(every)} mutants, seed {seed}", flush=True)
    if left := [m for m in drawn if m.id not in results.verdicts]:
        digest, order = copy_tree(tree), []
        for one in tests:
            if (key := f"{one} in tree {digest}") not in results.passed:
                end, seconds, by = run(tree, module, one, 1200)
                print(f"  without a fault: {one.path} {seconds:.1f} s", flush=True)
                if end != 0:
                    print(f"  exit status {end}, {by}; see {tree}.log")
                    return 3
                results.add_passed(key, seconds)
            order.append((one, results.passed[key]))
        order.sort(key=lambda pair: pair[1])
        for number, mutant in enumerate(left, 1):
            if time.monotonic() > until:
                break
            verdict, seconds, by = judge(tree, module, order, mutant.applied(source))
            results.add(mutant, verdict, seconds, by)
            print(f"  {number}/{len(left)} {verdict} {seconds:.1f} s  {mutant.id}", flush=True)
    return report(module, drawn, results, until)


def report(module: str, drawn: list[Mutant], results: Results, until: float) -> int:
    found = {m.id: results.verdicts[m.id] for m in drawn if m.id in results.verdicts}
    counts = dict.fromkeys(("killed", "timeout", "survived"), 0)
    for one in found.values():
        counts[one["verdict"]] += 1
    skipped, listed = len(drawn) - len(found), excuses(module)
    share = 1 - counts["survived"] / len(found) if found else 0.0
    alive = [i for i, one in found.items() if one["verdict"] == "survived"]
    for mutant in alive:
        line = f"line {found[mutant]['line']}"
        print(f"  survived, {line}: {mutant}\n    {listed.get(mutant, 'NOT EXCUSED')}")
    everything = {m.id for m in mutants((ROOT / "engram_jax" / f"{module}.py").read_text())}
    for stale in sorted(set(listed) - everything):
        print(f"  excused, but no mutant any more: {stale}")
    seconds = sum(one["seconds"] for one in found.values()) / max(1, len(found))
    print(
        f"{module}: {counts['killed']} killed, {counts['timeout']} timeouts,"
        f" {counts['survived']} survived ({sum(i in listed for i in alive)} excused),"
        f" {skipped} skipped; {share:.1%} noticed, {seconds:.1f} s each",
        flush=True,
    )
    if skipped:
        return 2
    return int(share < LEAST or any(i not in listed for i in alive))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(COVERING)}; none: all")
    parser.add_argument("--sample", type=int, default=50, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--hours", type=float, default=2.0, help="for all modules together")
    given = parser.parse_args()
    if unknown := set(given.modules) - set(COVERING):
        parser.error(f"{min(unknown)}: must be of {', '.join(COVERING)}")
    until = time.monotonic() + 3600 * given.hours
    KEPT.mkdir(exist_ok=True)
    for name in WARM.split():
        importlib.import_module(name)
    return max(
        try_module(m, given.sample, given.seed, until) for m in given.modules or list(COVERING)
    )


if __name__ == "__main__":
    sys.exit(main())
