"""The kernels as they run: blocks of their own choice, several columns at once, several blocks."""

import jax.numpy as jnp
import pytest

from kernels_pallas import tuning
from kernels_pallas.short_conv import tpu
from kernels_pallas.short_conv.shapes import REAL, Shape
from tests.kernels.short_conv.cases import arguments, check, error, run


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_kernel_against_the_oracle_and_the_reference(dtype):
    shape = Shape(2, 600, 2, 512, 4, 3)
    found, segments, mask, g = arguments(shape, dtype, seed=3)
    segments, mask = segments // 24, mask | (segments % 2 == 0)
    check(found, segments, mask, g, shape, dtype)
    ours, theirs = (run(i, shape, found, segments, mask, g, dtype) for i in ("pallas", "reference"))
    limit = 1e-6 if dtype == "float32" else 1e-2
    assert error(ours[0], theirs[0]) <= limit
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == b.dtype and error(a, b) <= limit


BOTH = [(2, False), (2, True), (4, False), (4, True)]


@pytest.mark.parametrize("vmem", [62, 126])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_blocks_at_the_true_sizes(shape, vmem, monkeypatch):
    """As long as they may be, in VMEM of every generation."""
    monkeypatch.setattr(tuning, "vmem_limit", lambda: vmem * tuning.MIB)
    for size, backward in BOTH:
        block = tpu.blocks_for(shape.tokens, 16, shape.d, size, backward=backward)
        assert block.tokens == tpu.MAX_TOKENS
    if vmem == 62:
        sizes = [tpu.blocks_for(8192, 16, 10240, size, backward=b) for size, b in BOTH]
        assert [block.tokens for block in sizes] == [256, 128, 128, 128]


def test_blocks_of_few_tokens():
    for tokens, block in ((1, 64), (65, 128), (129, 192), (8192, tpu.MAX_TOKENS)):
        assert tpu.blocks_for(tokens, 16, 128, 4).tokens == block


def test_blocks_that_were_tuned():
    with tuning.trying({("short_conv", "d256_2_backward"): {"tokens": 128}}):
        assert tpu.blocks_for(8192, 16, 256, 2, backward=True).tokens == 128
        assert tpu.blocks_for(8192, 16, 256, 2).tokens == tpu.MAX_TOKENS


def test_too_wide(monkeypatch):
    monkeypatch.setattr(tuning, "vmem_limit", lambda: 62 * tuning.MIB)
    for kernel, dilation, widest in ((4, 3, 12544), (8, 8, 10880)):
        for d, fits in ((widest, True), (widest + 128, False)):
            found = tpu.limit((1, 8192, 4, d), kernel, dilation, (jnp.float32,) * 3)
            assert found == (None if fits else f"d = {d} is too wide for VMEM")
