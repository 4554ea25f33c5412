"""The tiny model, served."""

from __future__ import annotations

import pytest

from tests.serve.served import make_engine


@pytest.fixture
def engine():
    """A fresh engine over the tiny model, its table on the device."""
    made = make_engine()
    yield made
    made.close()
