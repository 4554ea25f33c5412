"""One program: train, evaluate, generate from, serve, describe or compile a model, or run many.

    python launch.py --config=configs/engram_tiny.py
    python launch.py --config=configs/engram_tiny.py --mode=generate --prompt="def main("
    python launch.py --config=configs/engram_tiny.py --mode=serve --config.serve.port=8000
    python launch.py --config=configs/engram27b.py --mode=describe --json
    python launch.py --config=configs/engram27b.py --mode=compile --topology=v5p:4x4x8
    python launch.py --config=configs/experiments/allocation.py --mode=sweep

Modes: train (the default), evaluate, analyse, generate, serve, explore, export-memory,
count-memory, describe, compile, sweep. --help lists what each reads, and the keys of the
configuration.

Any key of the configuration can be overridden: --config.train.steps=100. A run lives in its
--workdir (default runs/<config.name>); the same command resumes it, and --workdir alone takes the
configuration that is stored there. On a TPU slice give every host the same command; elsewhere
--coordinator_address, --num_processes and --process_id join processes.
"""

from __future__ import annotations

from engram_jax.hardware.huge_pages import restart_with_huge_pages
from engram_jax.hardware.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    restart_with_huge_pages()  # before anything is loaded

    from engram_jax.cli import run

    run()
