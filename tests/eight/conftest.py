"""Tests of this folder need 8 devices: tests/test_eight_devices.py runs them in such a process."""

import jax

DEVICES = 8

if jax.device_count() != DEVICES:
    collect_ignore_glob = ["test_*.py"]
