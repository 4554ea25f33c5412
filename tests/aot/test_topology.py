"""Slices by name."""

from __future__ import annotations

import os

import jax
import pytest

from engram_jax.aot.topology import slice_topology
from engram_jax.config.errors import UserError
from engram_jax.hardware.generations import GENERATIONS
from engram_jax.hardware.peak_flops import peak_flops


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
