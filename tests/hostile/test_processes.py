"""Launches that are interrupted, lose their disk or their parent: processes of their own.

Each prints one line, has the status of its kind, and leaves nothing that runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engram_jax.checkpoint.workdir import checkpoint_steps
from engram_jax.hardware.storage import replacing
from tests.runs import ROOT, Outcome, environment, launched, small_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("hostile") / "text")


LIMITED = (
    "import os, resource, sys; limit = int(sys.argv[1]);"
    " resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY));"
    " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def started(corpus: Path, workdir: Path, limit: int = 0, **overrides) -> subprocess.Popen:
    """A launch. limit: the most bytes of a file that it can write, 0 = no limit."""
    command = [str(ROOT / "launch.py"), *small_run(corpus, workdir, **overrides)]
    env = environment()
    if limit:
        command = ["-c", LIMITED, str(limit), *command]
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # it would meet the limit first
    return subprocess.Popen(
        [sys.executable, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen) -> Outcome:
    out, err = process.communicate(timeout=200)
    return Outcome(process.returncode, out, err)


def group(process: subprocess.Popen) -> set[int]:
    """The processes of its session that are running."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.add(int(folder.name))
    return found


def waited(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


MOMENTS = [0.3, 1.0, 2.0, 3.0, 5.0, 8.0]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", MOMENTS)
def test_ctrl_c_at_any_moment_of_the_start_ends_once(seconds, corpus, tmp_path):
    process = started(corpus, tmp_path / "run", train__steps=20_000)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGINT)
    outcome = ended(process)
    if seconds <= 1 and outcome.code in (-2, 1):
        return  # before the program's first line the signal is Python's own
    assert "Traceback" not in outcome.err
    lines = [line for line in (outcome.out + outcome.err).splitlines() if "SIGINT" in line]
    if outcome.code == 0:  # from the data on: as SIGTERM
        assert len(lines) == 1 and "; the same command goes on" in lines[0]
    else:
        assert outcome.code == 130 and re.fullmatch(r"error: interrupted.*\n", outcome.err)


@pytest.mark.slow
def test_ctrl_c_saves_as_sigterm_does(corpus, tmp_path):
    process = started(corpus, tmp_path / "run", train__steps=20_000)
    waited(lambda: len(checkpoint_steps(tmp_path / "run")) > 0)
    os.kill(process.pid, signal.SIGINT)
    outcome = ended(process)
    assert outcome.code == 0, outcome.err
    step = checkpoint_steps(tmp_path / "run")[-1]
    line = f"SIGINT: stopped, checkpoint {step} in {tmp_path / 'run'}; the same command goes on"
    assert outcome.out.splitlines()[-1] == line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_stay_until_the_save_and_end_with_their_parent(number, corpus, tmp_path):
    process = started(corpus, tmp_path / "run", train__steps=20_000, data__workers=2)
    waited(lambda: len(checkpoint_steps(tmp_path / "run")) > 0)
    assert len(group(process)) >= 3
    if number == signal.SIGKILL:
        os.kill(process.pid, number)
    else:
        os.killpg(process.pid, number)  # as a terminal or a batch system does
    outcome = ended(process)
    waited(lambda: not group(process), 10)
    if number == signal.SIGKILL:
        assert outcome.code == -9
        return
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err and "leaked" not in outcome.err
    assert f"{number.name}: stopped, checkpoint " in outcome.out.splitlines()[-1]


LIMITS = [2_000, 20_000, 60_000]  # bytes of a file: run.json, the tokenizer, a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_that_takes_no_more_is_one_line(limit, corpus, tmp_path):
    """By a limit on the size of files, which is met where a full disk would be."""
    counts = ["--mode=count-memory", f"--output={tmp_path / 'counts'}", "--tokens=100"]
    prepared = launched(*small_run(corpus, tmp_path / "none"), *counts)
    assert prepared.code == 0, prepared.err
    large = {"model__engram__rows_per_head": (20_001,)}
    outcome = ended(started(corpus, tmp_path / "run", limit, **large))
    assert outcome.code == 2
    error = [line for line in outcome.err.splitlines() if not line.startswith("step ")]
    assert len(error) == 1, outcome.err
    assert error[0].startswith("error: ") and "File too large" in error[0]
    assert str(tmp_path / "run") in error[0]
    if limit != max(LIMITS):
        return
    again = ended(started(corpus, tmp_path / "run", train__steps=3, **large))
    assert again.code == 0, again.err


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "memory"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from engram_jax.hardware.storage import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    print('here', flush=True)\n"
        "    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    killed, going = (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        for process in (killed, going):
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        killed.kill()
        killed.wait()
        partials = sorted(tmp_path.glob("*.partial"))
        assert len(partials) == 2
        for partial in partials:
            os.utime(partial, (time.time() - 600, time.time() - 600))
        with replacing(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
        assert len(list(tmp_path.glob("*.partial"))) == 1  # of the one that still writes
    finally:
        for process in (killed, going):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
