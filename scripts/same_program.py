"""Whether two revisions compute the same: run it before and after a change that is to change none.

    python scripts/same_program.py main                  # this working tree against main
    python scripts/same_program.py v1.0 --head v1.1      # two revisions
    python scripts/same_program.py main --control        # and that differences would be seen

Compares, each with a line `same` or `DIFFERENT` (with what differs first):

    program    the training, decoding, evaluation and serving steps of three configurations, lowered
               for a TPU slice, Pallas kernels included; up to names and places in the source
               (same_program_probe.py, same_program_text.py)
    describe   --mode=describe --json of every configuration
    train      losses, gradient norms and all other metrics of 20 training steps on the CPU
    open       what HEAD makes of BASE's checkpoint and memory file against what BASE makes of them:
               --mode=evaluate, further training, --mode=generate

The exit status is 0 if all is the same, 1 if something differs, 2 if BASE cannot be run. With
--control, changes of a constant, a dtype and a sharding are made to copies of HEAD (CONTROLS), and
one that is not reported where it must be is a failure, too.

Both revisions run under this interpreter. Needs libtpu, no TPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
CASES = ("engram_tiny", "moe_tiny", "engram27b")
TRAINED = ("engram_tiny", "moe_tiny")
STEPS, MORE = 20, 5
# Small enough for seconds; every metric of every step is logged.
SMALL = {
    "tokenizer.vocab_size": 512,
    "model.hyper.sinkhorn_iterations": 2,  # unrolled: most of what there is to compile
    "data.source": "folder",
    "data.seq_len": 64,
    "data.batch_size": 4,
    "optimizer.warmup_steps": 5,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": STEPS // 2,
    "train.eval_batches": 2,
    "train.checkpoint_every": STEPS // 2,
    "train.count_models": False,
    "train.samples": (),
}
# Metrics that the machine decides, by the beginnings of their names.
MEASURED = ("time", "step_seconds", "tokens_per_second", "mfu", "goodput")
PROMPT = "one two"


@dataclass(frozen=True)
class Control:
    """A change that must be seen.

    file: a pattern that the only file which has `old` matches. differ, same: patterns of the
    comparisons that must report it, and of those that must not.
    """

    name: str
    file: str
    old: str
    new: str
    differ: tuple[str, ...]
    same: tuple[str, ...]

    def apply(self, checkout: Path) -> None:
        """Make the change. Raises ValueError if not exactly one file has the old text, once."""
        texts = {path: path.read_text() for path in checkout.glob(self.file)}
        having = [path for path, text in texts.items() if self.old in text]
        if len(having) != 1 or texts[having[0]].count(self.old) != 1:
            raise ValueError(
                f"control, {self.name}: {self.old!r} must be once in one {self.file}, and is in"
                f" {len(having)}: give CONTROLS in {Path(__file__).name} another change"
            )
        having[0].write_text(texts[having[0]].replace(self.old, self.new))


CONTROLS = (
    Control(
        "a constant (Newton-Schulz)",
        "engram_jax/**/muon.py",
        "(3.4445, -4.7750, 2.0315)",
        "(3.4445, -4.7751, 2.0315)",
        differ=("program engram_tiny.train", "train engram_tiny"),
        same=("program engram_tiny.evaluate", "program engram_tiny.serve.*"),
    ),
    Control(
        "a constant in a kernel (context gate)",
        "kernels_pallas/engram_gate/tpu.py",
        "s = moved(sums, -m) * r_key * r_h * d**-0.5",
        "s = moved(sums, -m) * r_key * r_h * d**-0.25",
        differ=(
            "program engram_tiny.train",
            "program engram_tiny.evaluate",
            "program engram_tiny.chip.*.layer*",
        ),
        same=("program engram_tiny.serve.*", "program engram_tiny.chip.*.first"),
    ),
    Control(
        "a dtype (alternatives' ids)",
        "engram_jax/**/sampling.py",
        "top - total, ids.astype(jnp.int32)",
        "top - total, ids.astype(jnp.uint32)",
        differ=("program engram_tiny.*.sample.logprobs",),
        same=("program engram_tiny.train", "program engram_tiny.*.sample"),
    ),
    Control(
        "a sharding (the keys' and values' latent width)",
        "engram_jax/sharding/*.py",
        '"latent": ("fsdp",)',
        '"latent": ()',
        differ=(
            "program engram_tiny.train",
            "program engram_tiny.evaluate",
            "program engram_tiny.serve.*.first",
        ),
        same=("program engram_tiny.chip.*.sample",),
    ),
)


class FailedError(Exception):
    """A command of a revision ended badly; the message is its last line on standard error."""


def same(name: str, base: str, head: str) -> bool:
    """Compare two texts and print the line about it."""
    if base == head:
        print(f"same       {name} ({len(base):,} bytes)", flush=True)
        return True
    hint = ": the same lines in another order" if _operations(base) == _operations(head) else ""
    print(f"DIFFERENT  {name}{hint}", flush=True)
    for line in first_difference(base, head):
        print(f"           {line}", flush=True)
    return False


def _operations(text: str) -> Counter[str]:
    """How often every line is there, whatever the numbers of the values in it."""
    return Counter(re.sub(r"%\w+(:\d+|#\d+)?", "%", line) for line in text.splitlines())


def first_difference(base: str, head: str, most: int = 3, width: int = 160) -> list[str]:
    """Where two texts part, and the lines of both there that differ, cut to what surrounds it.

    Line is compared with line: a program's lines can be megabytes, too long to be aligned.
    """
    pairs = list(itertools.zip_longest(base.splitlines(), head.splitlines(), fillvalue=""))
    apart = [i for i, (one, other) in enumerate(pairs) if one != other][:most]
    told = []
    for i in apart:
        one, other = pairs[i]
        ends = zip(one, other, strict=False)
        shorter = min(len(one), len(other))
        column = next((at for at, (a, b) in enumerate(ends) if a != b), shorter)
        start = max(0, column - width // 2)
        told.append(f"line {i + 1}, column {column + 1}:")
        told += [
            f"{sign} {line[start : start + width]}"
            for sign, line in zip("-+", pairs[i], strict=True)
        ]
    return told


class Revision:
    """A checkout, and what it wrote into `folder`."""

    def __init__(self, name: str, checkout: Path, folder: Path, compiled: Path):
        self.name, self.checkout, self.folder = name, checkout, folder
        self._environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # A program that is the same for both is compiled once, and without optimisations: what is
        # compared is what the revisions ask of the compiler.
        given = os.environ.get("XLA_FLAGS", "")
        self._environment |= {
            "XLA_FLAGS": f"{given} --xla_backend_optimization_level=0".strip(),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        folder.mkdir(parents=True)

    def run(self, *command: str) -> str:
        """Standard output of Python on these arguments, in the checkout."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.checkout,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise FailedError(f"{self.name}: {command[:3]} ended with {done.returncode}: {last}")
        return done.stdout

    def programs(self, *cases: str) -> dict[str, str]:
        """Canonical texts by "CASE.PROGRAM"."""
        folder = self.folder / "programs"
        self.run(str(SCRIPTS / "same_program_probe.py"), str(folder), *cases)
        return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}

    def descriptions(self) -> dict[str, str]:
        """What --mode=describe says, by configuration; a value per line."""
        found = {}
        for path in sorted((self.checkout / "configs").glob("*.py")):
            if path.stem != "__init__":
                flags = f"--config=configs/{path.name}", "--mode=describe", "--json"
                found[path.stem] = json.dumps(json.loads(self.run("launch.py", *flags)), indent=1)
        return found

    def train(self, name: str, text: Path) -> Path:
        """A run of STEPS steps; returns its workdir."""
        places = {"data.path": text, "data.cache_dir": self.folder / "cache"}
        workdir = self.folder / name
        self.run(
            "launch.py",
            f"--config=configs/{name}.py",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in {**SMALL, **places}.items()),
        )
        return workdir

    def opened(self, name: str, run: Path, memory: Path | None) -> dict[str, str]:
        """What this revision makes of a run of BASE's, by what it does with it."""
        workdir = self.folder / f"{name}-opened"
        shutil.copytree(run, workdir)
        found = {
            "evaluate": self.run("launch.py", f"--workdir={workdir}", "--mode=evaluate", "--json")
        }
        self.run(
            "launch.py",
            f"--workdir={workdir}",
            f"--config.train.steps={STEPS + MORE}",
            "--accept_changes=train.steps",
        )
        found["resume"] = metrics(workdir, after=STEPS)
        for place in ("disk", "host") if memory else ():
            found[f"generate, memory on {place}"] = self.run(
                "launch.py",
                f"--workdir={workdir}",
                "--mode=generate",
                f"--step={STEPS}",
                f"--prompt={PROMPT}",
                "--config.generate.max_tokens=32",
                f"--config.serve.memory={place}",
                f"--config.serve.memory_file={memory}",
            )
        return found

    def export(self, name: str, run: Path) -> Path:
        """The memory file of a run, which is only read."""
        path = self.folder / f"{name}.memory"
        flags = f"--workdir={run}", "--mode=export-memory", f"--output={path}"
        self.run("launch.py", *flags)
        return path


def metrics(workdir: Path, after: int = 0) -> str:
    """metrics.jsonl of the steps behind `after`, without what the machine decides; one per line,
    numbers as they were written, which is to the last bit."""
    lines = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in sorted(record):
            if record["step"] > after and not key.startswith(MEASURED):
                lines.append(f"{record['step']} {key} {json.dumps(record[key])}")
    return "\n".join(lines)


def check_out(revision: str | None, root: Path, folder: Path) -> Path:
    """A revision's files, or those of the working tree at `root` (None), in `folder`."""
    folder.mkdir(parents=True)
    if revision is None:
        listed = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        return folder
    command = ["git", "-C", str(root), "archive", revision]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
        with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
            tar.extractall(folder, filter="data")
    if archive.returncode:
        raise FailedError(f"git archive {revision} ended with {archive.returncode}")
    return folder


def write_text(folder: Path, documents: int = 80) -> Path:
    """Text files of random words, the same ones at every call."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    folder.mkdir()
    for number in range(documents):
        chosen = rng.choices([*words, *PROMPT.split()], k=rng.randint(50, 200))
        (folder / f"{number:03}.txt").write_text(f"document {number}\n{' '.join(chosen)}\n")
    return folder


class Comparison:
    """Counts what has been compared. Every comparison has a name "SECTION WHAT"."""

    def __init__(self) -> None:
        self.results: dict[str, bool] = {}
        self.bytes = 0

    def texts(self, section: str, base: Mapping[str, str], head: Mapping[str, str]) -> None:
        for name in sorted(base.keys() | head.keys()):
            one, other = base.get(name, "(none)"), head.get(name, "(none)")
            self.bytes += len(one)
            self.results[f"{section} {name}"] = same(f"{section} {name}", one, other)

    def failed(self, section: str, error: FailedError) -> None:
        self.results[section] = False
        print(f"DIFFERENT  {section}: {error}", flush=True)

    def summary(self) -> str:
        programs = sum(name.startswith("program ") for name in self.results)
        different = sum(not result for result in self.results.values())
        return (
            f"{len(self.results)} comparisons, {programs} of them programs, {self.bytes:,} bytes:"
            f" {different} different"
        )


def compare(base: Revision, head: Revision, text: Path) -> Comparison:
    """All sections. Raises FailedError if BASE cannot be run; HEAD's failures are differences."""
    found = Comparison()
    expected = base.programs(*CASES)
    try:
        found.texts("program", expected, head.programs(*CASES))
    except FailedError as error:
        found.failed("program", error)
    expected = base.descriptions()
    try:
        found.texts("describe", expected, head.descriptions())
    except FailedError as error:
        found.failed("describe", error)
    for name in TRAINED:
        run = base.train(name, text)
        try:
            own = metrics(head.train(name, text))
            found.texts("train", {name: metrics(run)}, {name: own})
        except FailedError as error:
            found.failed(f"train {name}", error)
        memory = base.export(name, run) if name.startswith("engram") else None
        expected = base.opened(name, run, memory)
        try:
            found.texts(f"open {name},", expected, head.opened(name, run, memory))
            if memory:
                exported = {"export": memory.read_bytes().hex()}
                again = {"export": head.export(name, run).read_bytes().hex()}
                found.texts(f"open {name},", exported, again)
        except FailedError as error:
            found.failed(f"open {name}", error)
    return found


def unseen(control: Control, folder: Path, head: Revision, text: Path, compiled: Path) -> list[str]:
    """What a control was not reported in, or was wrongly; empty if all is as it must be."""
    print(f"control: {control.name}", flush=True)
    checkout = folder / "checkout"
    shutil.copytree(head.checkout, checkout)
    control.apply(checkout)
    changed = Revision(control.name, checkout, folder / "results", compiled)
    case, found = CASES[0], Comparison()
    kept = sorted((head.folder / "programs").glob(f"{case}.*.txt"))
    found.texts("program", {p.stem: p.read_text() for p in kept}, changed.programs(case))
    if any(pattern.startswith("train ") for pattern in control.differ):
        run = {case: metrics(changed.train(case, text))}
        found.texts("train", {case: metrics(head.folder / case)}, run)
    wrong = []
    for wanted, patterns in ((False, control.differ), (True, control.same)):
        for pattern in patterns:
            matching = fnmatch.filter(found.results, pattern)
            if not matching or any(found.results[name] != wanted for name in matching):
                wrong.append(f"{pattern} must be {'same' if wanted else 'DIFFERENT'}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a revision")
    parser.add_argument("--head", help="a revision; default: the working tree of this folder")
    parser.add_argument("--control", action="store_true", help="also show that changes are seen")
    parser.add_argument("--keep", type=Path, help="a new folder for the results, which stays")
    given = parser.parse_args(arguments)
    top = ["git", "rev-parse", "--show-toplevel"]
    root = Path(subprocess.run(top, check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory(prefix="same_program_") as temporary:
        if given.keep:
            given.keep.mkdir(parents=True)
        folder = (given.keep or Path(temporary)).resolve()
        text, compiled = write_text(folder / "text"), folder / "compiled"
        base, head = (
            Revision(
                name, check_out(revision, root, folder / f"{name}-tree"), folder / name, compiled
            )
            for name, revision in (("BASE", given.base), ("HEAD", given.head))
        )
        try:
            found = compare(base, head, text)
        except FailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        good = all(found.results.values())
        lines = [found.summary()]
        for number, control in enumerate(CONTROLS if given.control else ()):
            wrong = unseen(control, folder / f"control{number}", head, text, compiled)
            good = good and not wrong
            told = f"NOT SEEN: {'; '.join(wrong)}" if wrong else "seen where it must be"
            lines.append(f"control, {control.name}: {told}")
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
