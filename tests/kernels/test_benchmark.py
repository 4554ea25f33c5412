"""The timing of kernels, on a case small enough for a CPU."""

import jax
import jax.numpy as jnp

from benchmarks import kernels
from kernels_pallas.cases import OURS, XLA, Case
from kernels_pallas.engram_gate.shapes import Shape, arrays


def test_a_case_is_timed_against_its_floor():
    like = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def thrice(x):
        return x @ x @ x @ x

    case = Case("product", (like,), {XLA: thrice, OURS: lambda x: x}, bytes=8 * 64 * 64, flops=10)
    found = kernels.measure(case, {"bytes": 1e9, "bf16": 1e9, "fp8": 1e9}, rounds=3)
    assert found["floor_seconds"] == 8 * 64 * 64 / 1e9
    assert found["speedup"] == found["seconds"][XLA] / found["seconds"][OURS] > 0
    assert found["of_roofline"] == found["floor_seconds"] / found["seconds"][OURS]


def test_inputs_have_the_shapes_and_differ():
    like = arrays(Shape(64, 128, 2, 128), jnp.bfloat16, "mx", prepared=True)
    one, two = (kernels.inputs(like, seed) for seed in (0, 1))
    for a, b, shape in zip(*map(jax.tree.leaves, (one, two, like)), strict=True):
        assert a.shape == shape.shape and a.dtype == shape.dtype
        assert (a.astype(jnp.float32) != b.astype(jnp.float32)).any()
        assert jnp.isfinite(a.astype(jnp.float32)).all()


def test_without_an_accelerator_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernels"])
    assert kernels.main() == 2
    assert capsys.readouterr().err.startswith("no accelerator: ")
