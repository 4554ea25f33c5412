"""`python -m engram_jax` is launch.py, for where only the package is installed."""

from engram_jax.hardware.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()

    from engram_jax.cli import run

    run()
