"""One explorer, and its page over HTTP, for all tests of this folder (in each worker)."""

from __future__ import annotations

import pytest

from tests.explore.explored import Page, counted_text, explorer


@pytest.fixture(scope="session")
def shown():
    """The explorer, its training text counted."""
    return explorer(counted_text())


@pytest.fixture(scope="session")
def page(shown):
    with Page(shown) as running:
        yield running
