"""One file per model; `get_config()` starts from `engram_jax.config`'s defaults."""
