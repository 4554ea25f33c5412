"""engram_jax: Engram conditional memory (arXiv 2601.07372) in JAX and Flax."""

__version__ = "0.1.0"
