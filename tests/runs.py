"""The program as a user starts it, on a corpus and a model small enough for seconds.

`launched` runs launch.py's own two functions in this process: the same flags, messages and exit
codes as a process of its own, without ten seconds of imports.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import engram_tiny
from engram_jax import cli
from engram_jax import config as config_lib
from engram_jax.program_flags import parse_flags
from tests.xla_flags import cpu_flags

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
TINY = f"--config={ROOT / 'configs' / 'engram_tiny.py'}"

NEVER_WRITTEN = Path(tempfile.gettempdir()) / "engram_jax-never-written"

# One dense and one MoE layer, the latter with memory: every part there is, little to compile.
SMALL = {
    "tokenizer.vocab_size": 300,
    "model.d_model": 16,
    "model.layers": 2,
    "model.attention.heads": 2,
    "model.attention.kv_lora_rank": 8,
    "model.attention.nope_dim": 8,
    "model.attention.rope_dim": 4,
    "model.attention.v_dim": 6,
    "model.hyper.streams": 2,
    "model.ffn.dense_dim": 24,
    "model.ffn.routed_experts": 4,
    "model.ffn.top_k": 2,
    "model.ffn.expert_dim": 12,
    "model.engram.layers": (1,),
    "model.engram.heads_per_order": 2,
    "model.engram.rows_per_head": (101,),
    "model.engram.d_mem": 16,
    "data.source": "folder",
    "data.validation_fraction": 0.2,
    "data.seq_len": 16,
    "data.batch_size": 4,
    "train.steps": 24,
    "train.log_every": 1,
    "train.eval_every": 12,
    "train.eval_batches": 2,
    "train.checkpoint_every": 3,
    "train.count_models": True,
    "train.samples": (),
    "optimizer.warmup_steps": 2,
    "optimizer.peak_lr": 1e-2,
}


@dataclass(frozen=True)
class Outcome:
    """How the program ended and what it wrote."""

    code: int
    out: str
    err: str


def configuration(name: str) -> config_lib.Config:
    """What configs/`name`.py returns."""
    return config_lib.parse_config(importlib.import_module(f"configs.{name}").get_config())


def flags_of(overrides: Mapping[str, Any]) -> list[str]:
    """{"train.steps": 3} -> ["--config.train.steps=3"]."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def in_mode(mode: str) -> list[str]:
    """The flags that start a mode, with what it cannot do without."""
    needed = {
        "generate": ["--prompt=a"],
        "export-memory": [f"--output={NEVER_WRITTEN}"],
        "lm-eval": ["--tasks=a"],
        "long-ppl": ["--texts=a=b"],
        "report": [f"--runs={NEVER_WRITTEN}"],
    }
    return [f"--mode={mode}", *needed.get(mode, [])]


def small_run(corpus: Path, workdir: Path, **overrides: Any) -> list[str]:
    """The arguments that train the small model on `corpus`; what is prepared lies beside it.

    overrides: keys with "__" for ".".
    """
    return [TINY, f"--workdir={workdir}", *flags_of(_small(corpus, overrides))]


def small_config(corpus: Path, **overrides: Any) -> config_lib.Config:
    """The configuration that `small_run` trains."""
    values = engram_tiny.get_config()
    values.update_from_flattened_dict(_small(corpus, overrides))
    return config_lib.parse_config(values)


def _small(corpus: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    places = {"data.path": str(corpus), "data.cache_dir": f"{corpus}-cache"}
    return SMALL | places | {key.replace("__", "."): value for key, value in overrides.items()}


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Text files of random words, none like another."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("abcdefghij"), size=4)) for _ in range(40)]
    folder.mkdir(parents=True)
    for number in range(documents):
        words = rng.choice(vocabulary, size=int(rng.integers(20, 80)))
        (folder / f"{number:03}.txt").write_text(f"document {number}\n{' '.join(words)}\n")
    return folder


def launched(*arguments: str) -> Outcome:
    """`python launch.py ARGUMENTS` in this process."""
    argv = ["launch.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    compiled = jax.config.jax_compilation_cache_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(_flags_as_before())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # config_flags
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(sys, "argv", argv)
        stack.callback(jax.config.update, "jax_compilation_cache_dir", compiled)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main(parse_flags(argv))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _flags_as_before() -> Iterator[None]:
    """Forget the overrides, and what was given; keep the flags of modules imported meanwhile."""
    saved = flagsaver.save_flag_values()
    try:
        yield
    finally:
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flagsaver.restore_flag_values(flagsaver.save_flag_values() | saved)


def environment() -> dict[str, str]:
    """Of a process on the CPU that compiles as we do and finds what we have compiled."""
    compiled = jax.config.jax_compilation_cache_dir
    kept = {"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": cpu_flags(), **kept}


def run_process(*arguments: str) -> Outcome:
    """`python launch.py ARGUMENTS` as a process of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    return Outcome(done.returncode, done.stdout, done.stderr)


def refused(outcome: Outcome, *words: str, out: str = "") -> str:
    """The program ended as it must on a user's mistake; returns the line.

    out: how standard output began, if there was something to tell before.
    """
    said, line = without_stages(outcome.out), without_stages(outcome.err)
    assert outcome.code == 2, outcome
    assert said == "" if not out else said.startswith(out)
    assert line.startswith("error: ")
    assert line.count("\n") == 1 and line.endswith("\n"), outcome.err
    for word in words:
        assert word in line
    return line


def without_stages(text: str) -> str:
    """Without the lines that say what the program is doing: "[  1.2 s] reading ..."."""
    return re.sub(r"^\[ *\d+\.\d s\] .*\n", "", text, flags=re.MULTILINE)
