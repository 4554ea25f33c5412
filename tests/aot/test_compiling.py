"""Compiling with the compiler's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.aot.compiling import compile_with_text

ONES = jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.fixture
def cache(tmp_path):
    """A persistent cache of compiled programs of its own, already in use."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    folder = tmp_path / "cache"
    jax.config.update(names[0], str(folder))
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1).lower(ONES).compile()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_compilation_cache_is_neither_read_nor_written(tpu_slice, cache):
    """A program from it has no text, and JAX cannot load one that was compiled for a described
    slice. Later programs use it again."""

    def entries() -> int:
        return len(list(cache.glob("*-cache")))

    _, mesh = tpu_slice("v5e:2x2")
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert entries() == 1
    for _ in range(2):
        text = compile_with_text(jax.jit(lambda x: x @ x).lower(x))[1]
        assert text.startswith("HloModule")
        assert entries() == 1
    jax.jit(lambda x: x + 2).lower(ONES).compile()
    assert entries() == 2
