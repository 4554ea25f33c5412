"""`python -m engram_jax` is launch.py, for where only the package is installed."""

from engram_jax.hardware.huge_pages import restart_with_huge_pages
from engram_jax.hardware.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    restart_with_huge_pages()

    from engram_jax.cli import run

    run()
