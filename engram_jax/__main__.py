"""`python -m engram_jax` is launch.py, for where only the package is installed."""

from engram_jax.cli import run

if __name__ == "__main__":
    run()
