"""One file per model or experiment; `get_config()` starts from engram_jax.config's defaults."""
