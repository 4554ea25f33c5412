"""Several processes that make one run: joining, agreeing, failing together, stopping in time."""
