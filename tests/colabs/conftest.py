"""One environment, one clone's source and one cache for all notebooks of a session."""

from __future__ import annotations

import pytest

from tests.colabs.notebooks import Environment, make_environment, snapshot
from tests.runs import environment as as_here
from tests.xla_flags import QUICK


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def shipped(source, tmp_path_factory) -> Environment:
    """What a user's notebook runs in, and finds nothing prepared or compiled."""
    variables = {"ENGRAM_CACHE": str(tmp_path_factory.mktemp("cache")), "JAX_PLATFORMS": "cpu"}
    return make_environment(tmp_path_factory.mktemp("shipped"), source, variables)


@pytest.fixture(scope="session")
def quick(source, tmp_path_factory) -> Environment:
    """The same with programs that XLA does not optimise, kept from one session to the next."""
    here = as_here()
    flags = here["XLA_FLAGS"] if QUICK in here["XLA_FLAGS"] else f"{here['XLA_FLAGS']} {QUICK}"
    variables = {
        **here,
        "XLA_FLAGS": flags.strip(),
        "ENGRAM_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    return make_environment(tmp_path_factory.mktemp("quick"), source, variables)
