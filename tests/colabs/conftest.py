"""One environment, one clone's source and one cache for all notebooks of a session."""

from __future__ import annotations

import pytest

from tests.colabs.notebooks import Environment, make_environment, snapshot
from tests.runs import environment as as_here
from tests.xla_flags import CPU_ALONE, QUICK


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
    cache = str(tmp_path_factory.mktemp("cache"))
    variables = as_here() | {"XLA_FLAGS": f"{QUICK} {CPU_ALONE}", "ENGRAM_CACHE": cache}
    return make_environment(tmp_path_factory.mktemp("quick"), source, variables)
