"""What the hostile cases share: the served tiny model, and a neighbour that must not notice."""

from __future__ import annotations

import pytest

from tests.serve.hostile.neighbour import expected_text, neighbour


@pytest.fixture(scope="module")
def expected_stream(web):
    return expected_text(web)


@pytest.fixture
def beside(web, expected_stream):
    """A stream that runs while the test does, and must end as if it ran alone."""
    with neighbour(web, expected_stream):
        yield
