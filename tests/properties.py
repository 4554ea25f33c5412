"""Hypothesis for the property tests: few examples, the same in every run, or many new ones.

ENGRAM_PROPERTIES=thorough tries 50 times as many, other ones each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

THOROUGH = 50  # times
_PROFILE = os.environ.get("ENGRAM_PROPERTIES", "repeatable")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", deadline=None, print_blob=True)
settings.load_profile(_PROFILE)


def examples(count: int) -> settings:
    """The decorator for a test of so many examples. Put it above `@given`."""
    return settings(max_examples=count * (THOROUGH if _PROFILE == "thorough" else 1))
