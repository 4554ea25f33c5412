"""A large model is analysed in its weights' memory and 2 GiB more, in a process with a limit."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY, environment, flags_of, write_corpus

# 1.0 B parameters, nearly all of them in two tables of 2 GB.
LARGE = {
    "tokenizer.vocab_size": 1000,
    "model.d_model": 256,
    "model.layers": 6,
    "model.ffn.routed_experts": 8,
    "model.engram.layers": (1, 4),
    "model.engram.heads_per_order": 4,
    "model.engram.rows_per_head": (1_960_000,),
    "model.engram.d_mem": 256,
    "data.source": "folder",
    "data.seq_len": 512,
    "data.batch_size": 4,
    "data.validation_fraction": 0.3,
    "train.steps": 1,
    "train.eval_batches": 1,
    "train.count_models": False,
    "train.samples": (),
    "optimizer.memory_optimizer": "frozen",
    "optimizer.warmup_steps": 0,
}
LIMIT = 2 << 30  # beside the weights
MOST = 14 << 30  # of a process: what needs more fails instead of stopping the machine
# Prints the process's highest resident memory, in KiB, behind the program's output.
PEAK = """
import atexit, resource, sys
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
atexit.register(lambda: print(peak(), file=sys.stderr))
sys.argv = ["launch.py", *sys.argv[1:]]
from engram_jax.cli import run
run()
"""


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights_bytes(workdir: Path) -> int:
    described = started(f"--workdir={workdir}", "--mode=describe", "--json")
    return 4 * json.loads(described.stdout)["total_params"]


@pytest.mark.slow
def test_every_analysis_is_bounded(tmp_path):
    corpus, workdir = tmp_path / "text", tmp_path / "run"
    write_corpus(corpus, documents=400)
    for file in corpus.iterdir():
        file.write_text(file.read_text().replace(" a", " A") * 5)
    places = {"data.path": corpus, "data.cache_dir": tmp_path / "cache"}
    started(TINY, f"--workdir={workdir}", *flags_of(LARGE | places))
    weights = weights_bytes(workdir)
    assert weights > 4e9
    arguments = ["--mode=analyse", "--json", "--text_tokens=2048"]
    done = started(f"--workdir={workdir}", *arguments)
    found = json.loads(done.stdout)
    assert set(found["seconds"]) == {"lens", "cka", "sensitivity", "gates", "usage", "rows"}
    peak = 1024 * int(done.stderr.splitlines()[-1])
    assert weights < peak < weights + LIMIT
