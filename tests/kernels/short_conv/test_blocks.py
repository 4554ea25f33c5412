"""The kernels as they run: blocks of their own choice, several columns at once, several blocks."""

import pytest

from kernels_pallas import tuning
from kernels_pallas.short_conv import tpu, tpu_backward
from kernels_pallas.short_conv.shapes import REAL, Shape
from tests.kernels.short_conv.cases import arguments, check, error, run


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_kernel_against_the_oracle_and_the_reference(dtype):
    shape = Shape(2, 600, 2, 512, 4, 3)
    found, segments, mask, g = arguments(shape, dtype, seed=3)
    segments, mask = segments // 24, mask | (segments % 2 == 0)
    check(found, segments, mask, g, shape, dtype)
    ours, theirs = (run(i, shape, found, segments, mask, g, dtype) for i in ("pallas", "reference"))
    limit = 1e-5 if dtype == "float32" else 2e-2  # the reference rounds at each step
    assert error(ours[0], theirs[0]) <= limit
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == b.dtype and error(a, b) <= limit


@pytest.mark.parametrize("vmem", [62, 126])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_blocks_fit(shape, vmem, monkeypatch):
    """With a quarter of VMEM left for the compiler; as long as they may be in bfloat16."""
    monkeypatch.setattr(tuning, "vmem_limit", lambda: vmem * tuning.MIB)
    for size in (2, 4):
        for arrays, scratch in ((2, 1), (tpu_backward.ARRAYS, tpu_backward.SCRATCH)):
            block = tpu.blocks_for(shape.tokens, shape.d, size, arrays, scratch)
            numbers = block.tokens * shape.d
            assert numbers * (2 * arrays * size + 4 * scratch) <= vmem * tuning.MIB * 3 / 4
            assert block.tokens == tpu.MAX_TOKENS or (size == 4 and block.tokens == 128)


def test_blocks_of_few_tokens():
    assert tpu.blocks_for(1, 128, 4).tokens == 64
    assert tpu.blocks_for(65, 128, 4).tokens == 128
    assert tpu.blocks_for(129, 128, 4).tokens == 192
    assert tpu.blocks_for(8192, 128, 4).tokens == tpu.MAX_TOKENS
