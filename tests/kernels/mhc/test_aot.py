"""mHC's kernels at their true sizes, compiled for every TPU generation: what they move and use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.aot.one_chip import compile_operation
from kernels_pallas.cases import OURS, XLA
from kernels_pallas.mhc import bench
from kernels_pallas.mhc.shapes import REAL

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
CASES = {case.name: case for case in bench.cases()}
# Of the floor, with what surrounds the kernels: fn's parts, sums of gradients, coefficients.
MOVED = {"pre forward": 1.06, "pre step": 1.08, "merge forward": 1.03, "merge step": 1.03}


def check(topology, case):
    found = compile_operation(topology, case.variants[OURS], *case.arguments)
    print(
        f"{topology.name} {case.name}: {found.bytes / case.bytes:.3f} of the floor, kernels"
        f" {found.kernel_bytes / case.bytes:.3f}, temporary {found.memory.temp / 1e6:.1f} MB,"
        f" VMEM {found.vmem / 2**20:.1f} MiB"
    )
    op = " ".join(case.name.split()[1:])
    shape = REAL[case.name.split()[0]]
    one = shape.tokens * shape.d * 2
    assert 1 << 20 < found.vmem < (126 if topology.name[:3] in ("v5e", "v6e") else 62) << 20
    assert found.bytes <= MOVED[op] * case.bytes
    assert found.memory.temp < one  # less than a stream
    assert found.xla_bytes < one  # no copy of a stream, so none of all
    return found


def test_merge(tpu_slice):
    check(tpu_slice("v5e:2x2")[0], CASES["engram27b merge step"])


def test_pre(tpu_slice):
    check(tpu_slice("v5p:2x2x1")[0], CASES["engram27b pre step"])


@pytest.mark.slow
def test_pre_beside_xla(tpu_slice):
    topology, _ = tpu_slice("v5e:2x2")
    case = CASES["engram27b pre step"]
    ours = check(topology, case)
    xla = compile_operation(topology, case.variants[XLA], *case.arguments)
    print(f"XLA: {xla.bytes / case.bytes:.3f}, temporary {xla.memory.temp / 1e6:.1f} MB")
    assert xla.bytes > 1.5 * ours.bytes  # there was something to gain
    assert xla.memory.temp > 10 * ours.memory.temp


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("case", CASES)
def test_every_case(tpu_slice, case, name):
    check(tpu_slice(name)[0], CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(("streams", "dtype"), [(1, "float32"), (3, "bfloat16"), (8, "float32")])
def test_other_streams_compile(tpu_slice, streams, dtype, name):
    shape = bench.Shape(1000, streams, 1280)
    arguments = bench.pre_arrays(shape, jnp.dtype(dtype))
    g = jax.eval_shape(lambda *a: bench._pre("reference", *a), *arguments)
    found = compile_operation(
        tpu_slice(name)[0], lambda *a: bench._step(bench._pre, "pallas", *a), g, *arguments
    )
    assert found.vmem > 1 << 20
    arguments = bench.merge_arrays(shape, jnp.dtype(dtype))
    found = compile_operation(
        tpu_slice(name)[0],
        lambda *a: bench._step(bench._merge, "pallas", *a),
        arguments[0],
        *arguments,
    )
    assert found.xla_bytes < np.prod(arguments[0].shape)
