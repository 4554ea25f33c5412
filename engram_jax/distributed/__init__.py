"""Runs of several processes: joining, agreeing, failing together, and stopping on preemption."""
