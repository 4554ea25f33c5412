"""Slices by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.aot.compiling import compile_with_text
from engram_jax.aot.data_movement import collectives
from engram_jax.aot.topology import slice_topology
from engram_jax.config import MeshConfig
from engram_jax.config.errors import UserError
from engram_jax.hardware.generations import GENERATIONS
from engram_jax.hardware.peak_flops import peak_flops
from engram_jax.sharding.rules import make_mesh


@pytest.mark.parametrize(
    ("name", "chips", "devices", "generation"),
    [
        ("v5e:2x4", 8, 8, "v5e"),
        ("v5p:4x4x8", 128, 128, "v5p"),
        ("v6e:16x16", 256, 256, "v6e"),
        ("tpu7x:2x2x1", 4, 8, "tpu7x"),
    ],
)
def test_slices(tpu_slice, name, chips, devices, generation):
    found, _ = tpu_slice(name)
    assert (found.name, found.generation, found.chips) == (name, generation, chips)
    assert len(found.devices) == devices == chips * found.devices_per_chip
    kind = found.devices[0].device_kind
    assert peak_flops(kind) == found.peak_flops


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("tpu7x:4x4x4", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),  # no whole cube: its rings of 4 are open, too
        ("tpu7x:2x2x1", (False, False, False)),
        ("v5e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),
        ("v6e:4x4", (False, False)),
    ],
)
def test_which_dimensions_wrap(tpu_slice, name, wraps):
    assert tpu_slice(name)[0].wraps == wraps


def all_gather(devices: Sequence[jax.Device]) -> str:
    """The compiled text of an all-gather of one matrix over the whole slice."""
    mesh = make_mesh(MeshConfig(), devices)
    shards, whole = (NamedSharding(mesh, spec) for spec in (P("fsdp"), P()))
    doubled = jax.jit(lambda x: 2 * x, in_shardings=shards, out_shardings=whole)
    matrix = jax.ShapeDtypeStruct((2560, 2560), jnp.bfloat16)
    return compile_with_text(doubled.lower(matrix), stage="after_codegen")[1]


@pytest.mark.parametrize("name", ["v5p:4x4x8", "v5p:4x4x4", "v6e:16x16"])
def test_a_torus_gathers_by_all_gathers(tpu_slice, name):
    """Described without its wraparound links libtpu makes an all-reduce of zero-filled copies, of
    twice the bytes."""
    slice_, _ = tpu_slice(name)
    (found,) = collectives(all_gather(slice_.devices))
    assert (found.kind, found.group_size) == ("all-gather", slice_.chips)
    assert found.bytes == 2560 * 2560 * 2 * (slice_.chips - 1) // slice_.chips


def test_a_slice_without_wraparound_links_is_compiled_without_them(tpu_slice):
    """libtpu would accept links that the slice does not have, and compile for them."""
    name = "v5p:2x4x4"
    describe = partial(topologies.get_topology_desc, platform="tpu", topology_name=name)
    described = tpu_slice(name)[0], describe(), describe(wrap=(True,) * 3)
    ours, default, torus = [
        all_gather(d.devices).partition("\n")[2]  # but for the first line: the module's number
        for d in described
    ]
    assert ours == default != torus


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v7x:2x2x1", "v5e, v5p, v6e, tpu7x"),
        ("v5p", "v5p:4x4x8"),
        ("v5p:4x4", "v5p:AxBxC"),
        ("v5e:4x4x4", "v5e:AxB"),
        ("v5e:0x2", "positive"),  # libtpu would crash
        ("v5e:2x2 ", "GENERATION:SIZE"),
    ],
)
def test_names_that_are_none(name, says):
    with pytest.raises(UserError) as error:
        slice_topology(name)
    assert repr(name) in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_slice_that_libtpu_refuses(tpu_slice):
    with pytest.raises(UserError, match=r"'v5e:3x3' is refused: .*not divisible"):
        tpu_slice("v5e:3x3")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[tpu\]\""):
        slice_topology("v5e:2x2")


def test_the_environment_stays_as_it_was(tpu_slice, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    tpu_slice("v5e:2x2")
    assert "TPU_SKIP_MDS_QUERY" not in os.environ
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "true"


def test_real_devices_by_kind():
    assert peak_flops("TPU v5p") == GENERATIONS["v5p"].flops
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None
    assert 2 * GENERATIONS["tpu7x"].flops == 2307e12  # a chip is two devices
