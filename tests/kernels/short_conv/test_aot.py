"""The short convolution at its true sizes, compiled for every TPU generation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.aot.one_chip import compile_operation
from kernels_pallas.cases import OURS, XLA
from kernels_pallas.short_conv import bench, tpu
from kernels_pallas.short_conv.api import short_conv_cached
from kernels_pallas.short_conv.shapes import ENGRAM27B, Shape, arrays

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LONGEST = tpu.MAX_CHUNKS * tpu.CHUNK - tpu.MAX_TOKENS
CASES = {case.name: case for case in bench.cases()}
# Of the floor. Backward reads 16 rows of u before each block of 256 a second time.
MOVED = {"forward": 1.01, "backward": 1.03}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if "v41" in c else ()) for c in CASES]
)
def test_every_case(tpu_slice, case, name):
    """Every array passes HBM once; nothing as large as a stream stands beside the kernel."""
    topology, _ = tpu_slice(name)
    case = CASES[case]
    found = compile_operation(topology, case.variants[OURS], *case.arguments)
    stream = case.arguments[0].size * 2
    report(topology, case.name, found, case.bytes)
    assert found.bytes <= MOVED[case.name.split()[-1]] * case.bytes
    assert found.memory.temp <= 0.01 * stream
    assert found.xla_bytes <= 0.01 * stream
    assert copies(found.text, case.arguments[0].shape) == []
    assert found.vmem <= (62 << 20)  # fits every generation with the same blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("case", [c for c in CASES if "engram27b" in c])
def test_xla_moves_more(tpu_slice, case, name):
    """There was something to gain, and the measure sees it."""
    topology, _ = tpu_slice(name)
    case = CASES[case]
    found = compile_operation(topology, case.variants[XLA], *case.arguments)
    report(topology, case.name + " by XLA", found, case.bytes)
    assert found.bytes > 1.5 * case.bytes


@pytest.mark.parametrize("name", SLICES)
def test_a_prefill_chunk(tpu_slice, name):
    topology, _ = tpu_slice(name)
    s = ENGRAM27B
    u, gain, taps, _ = arrays(Shape(1, 1024, s.streams, s.d, s.kernel, s.dilation), jnp.bfloat16)
    tail = jax.ShapeDtypeStruct((1, s.tail, s.streams, s.d), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((1,), jnp.int32)

    def chunk(u, tail, valid, gain, taps):
        return short_conv_cached(u, tail, valid, gain, taps, dilation=s.dilation, eps=1e-5)

    found = compile_operation(topology, chunk, u, tail, valid, gain, taps)
    floor = 2 * 2 * u.size + 2 * 2 * tail.size
    report(topology, "a chunk of 1,024", found, floor)
    assert found.kernel_bytes > 2 * 2 * u.size  # it is the kernel that runs
    assert copies(found.text, u.shape) == []
    # The gather of the new tail counts as if it read all of u.
    assert found.xla_bytes <= 2 * u.size + 0.1 * floor
    assert found.kernel_bytes <= 1.1 * floor


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (8, 8)])
def test_the_limits_compile(tpu_slice, kernel, dilation, name):
    """float32, ragged: the widest d that VMEM of every generation takes, and the most tokens."""
    topology, _ = tpu_slice(name)
    wide = [d for d in range(128, 1 << 15, 128) if fits((2, 1000, 1, d), kernel, dilation)]
    assert fits((1, LONGEST, 1, 128), kernel, dilation)
    assert not fits((1, LONGEST + 1, 1, 128), kernel, dilation)
    for b, t, d in ((2, 1000, wide[-1]), (1, LONGEST, 128), (12000, 60, 128)):
        s = Shape(b, t, 1, d, kernel, dilation)
        u, *rest = arrays(s, jnp.float32)
        forward = functools.partial(bench._forward, "pallas", dilation=dilation)
        backward = functools.partial(bench._backward, dilation=dilation)
        for function, args in ((forward, (u, *rest)), (backward, (u, u, *rest))):
            assert "short_conv" in lowered(topology, function, args).compile().as_text()


def lowered(topology, function, args):
    """Without counting traffic, which walks the grid: it is long."""
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    anywhere = PartitionSpec()
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=anywhere, out_specs=anywhere, check_vma=False
    )
    layout = Format(Layout.AUTO, NamedSharding(mesh, anywhere))
    return jax.jit(mapped, in_shardings=layout, out_shardings=layout).lower(*args)


def fits(shape, kernel, dilation):
    return tpu.limit(shape, kernel, dilation, (jnp.float32,) * 3) is None


def report(topology, name, found, floor):
    print(
        f"{topology.name} {name}: {found.bytes / floor:.3f} of the floor, temporary"
        f" {found.memory.temp / 1e6:.2f} MB, VMEM {found.vmem / 2**20:.1f} MiB"
    )


def copies(text, shape):
    """Instructions that copy or transpose an array of u's size, in whatever order of dimensions."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose|copy-start|fusion)\(", text)
    sizes = [(sorted(map(int, dims.split(","))), what) for dims, what in found]
    return [s for s in sizes if [n for n in s[0] if n > 1] == sorted(n for n in shape if n > 1)]
