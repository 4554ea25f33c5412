"""One file per model; `get_config()` starts from `default_config_dict()` (engram_jax/config)."""
