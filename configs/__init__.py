"""One file per model or experiment; `get_config()` starts from the defaults in engram_jax/config/."""
