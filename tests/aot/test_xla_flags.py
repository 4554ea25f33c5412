"""Every option is accepted by its generation and does what its comment says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from engram_jax.config import MeshConfig
from engram_jax.hardware.generations import GENERATIONS
from engram_jax.hardware.xla_flags import OPTIONS, TRAINING, options_for, options_of
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.sharding.rules import make_mesh
from engram_jax.training.step import jit_train_step
from tests.tiny import tiny

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:1x1x1"}


def program(rows, x, w):
    """An exchange beside products of tokens with 8 experts."""
    sizes = jnp.full((8,), x.shape[0] // 8, jnp.int32)
    return lax.all_to_all(rows, "x", 0, 0, tiled=True) * 2, lax.ragged_dot(
        x, w.reshape(8, 256, 256), sizes
    )


def compiled(shard_mapped, generation, options):
    shapes = (1024, 128), (1024, 256), (2048, 256)
    return shard_mapped(SLICES[generation], program, *shapes, dtype=jnp.bfloat16, options=options)


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_with_the_options(shard_mapped, generation):
    text = compiled(shard_mapped, generation, options_for(generation))
    split = "async-start(" in text and " all-to-all(" in text
    assert split == (generation != "v5e")
    assert "ragged-dot" in text and 'custom_call_target="tpu_custom_call"' in text
    assert " convolution(" not in text


def test_without_them(shard_mapped):
    text = compiled(shard_mapped, "v5e", {})
    assert "all-to-all-start" not in text
    assert " convolution(" in text and "tpu_custom_call" not in text


@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_of_a_mesh(tpu_slice, generation):
    assert options_of(tpu_slice(SLICES[generation])[1]) == OPTIONS[generation]


def test_trained_on_a_cpu_products_are_not_ynnpacks():
    """Of one program, its product is YNNPACK's by default; its sums over rows are with the options,
    too."""
    options, x = options_of(make_mesh(MeshConfig()), training=True), jnp.ones((512, 512))
    assert options == TRAINING["cpu"]

    def library(function, options):
        text = jax.jit(function, compiler_options=options).lower(x).compile().as_text()
        return "__ynn_fusion" in text

    assert library(lambda x: x @ x, {}) and not library(lambda x: x @ x, options)
    assert library(lambda x: jnp.sum(x * x, axis=1), options)


def test_they_reach_the_training_step_and_nothing_that_is_served(monkeypatch):
    """With AVX2 alone a row's last bits would depend on where it stands (hardware/xla_flags.py)."""
    made, given = tiny()[0], []
    jit = jax.jit
    monkeypatch.setattr(
        jax, "jit", lambda f, **how: given.append(how["compiler_options"]) or jit(f, **how)
    )
    jit_train_step(made)
    assert given == [TRAINING["cpu"]]
    EngineSteps(made, made.config.serve)
    assert len(given) > 5 and not any(given[1:])


def test_nothing_for_other_machines():
    assert set(OPTIONS) == set(GENERATIONS) and set(TRAINING) == {"cpu"}
    assert options_for("NVIDIA H200") == options_for(None) == {}


def test_what_the_user_has_set_stays(monkeypatch, tpu_slice):
    (name,) = TRAINING["cpu"]
    cpu, v5p = make_mesh(MeshConfig()), tpu_slice(SLICES["v5p"])[1]
    assert options_of(cpu) == {} and options_of(cpu, training=True) == TRAINING["cpu"]
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=LIBRARY_FUSION_TYPE_DOT")
    assert options_of(cpu, training=True) == {}
    assert options_of(v5p) == options_of(v5p, training=True) == OPTIONS["v5p"]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_async_all_to_all=false")
    assert options_of(v5p) == {}
