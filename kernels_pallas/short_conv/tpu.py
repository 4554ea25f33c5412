"""The short convolution on TPU, forward (Mosaic).

The grid is (sequences, streams, blocks of tokens), the blocks in order. Of a block, u is read and
the output written; the normalised rows stay in VMEM, together with the last ones of the previous
block, for the taps that reach back. So every number is moved through HBM once.

Normalised rows are stored as [d / 128, history + tokens, 128]: rows of one column of lanes are
adjacent, so that reading them shifted by a few tokens costs nothing extra. A block is processed in
chunks of tokens; a chunk in which all taps are open (nearly all of them) ignores the bits.

SiLU(2 h) = h (1 + tanh h): one instruction and three operations where 1 / (1 + exp) takes a dozen.
For this the filters are halved by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.short_conv import openings

LANES, SUBLANES = 128, 8
MAX_KERNEL, MAX_DILATION = 8, 8
CHUNK = 64  # at least the longest reach, 7 * 8
MAX_TOKENS = 256
UNROLL = 4  # columns of lanes per iteration of a loop, to hide latencies
MAX_CHUNKS = 1 << 16  # one number of each is in SMEM


@dataclass(frozen=True)
class Blocks:
    """tokens: of a grid step, a multiple of 128 (or of chunk, if one step holds all)."""

    tokens: int
    chunk: int = CHUNK


def limit(shape: tuple[int, ...], kernel: int, dilation: int, dtypes: tuple) -> str | None:
    """Why the kernels do not support u of `shape` [B, T, M, d], None if they do. dtypes: u's first,
    then the other arguments'."""
    b, t, _, d = shape
    if b * t == 0:
        return "there are no tokens"
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"{dtype} is not float32 or bfloat16"
    if d % LANES:
        return f"d = {d} is not a multiple of {LANES}"
    if kernel > MAX_KERNEL or dilation > MAX_DILATION:
        return f"kernel = {kernel}, dilation = {dilation}: more than {MAX_KERNEL}, {MAX_DILATION}"
    if b * (t + MAX_TOKENS) > MAX_CHUNKS * CHUNK:
        return f"{b} sequences of {t} are more than {MAX_CHUNKS * CHUNK} tokens"
    before, size = history_rows(kernel, dilation), max(jnp.dtype(x).itemsize for x in dtypes[:2])
    if vmem(LANES, before, d, size, backward=True) > tuning.vmem_limit() * 31 // 32:
        return f"d = {d} is too wide for VMEM"
    return None


def vmem(tokens: int, before: int, d: int, size: int, *, backward: bool = False) -> int:
    """Bytes of VMEM for blocks of `tokens` tokens; size: bytes of a number of u or the output.

    Two blocks of every operand and result; in float32 the normalised rows with those before, and
    backward also the gradients dh with those after.
    """
    if not backward:
        rows = 4 * size * tokens + 4 * (tokens + before) + 2 * size * before
        return d * (rows + 4 * 4 * SUBLANES)
    rows = 6 * size * tokens + 2 * 4 * (tokens + before) + 2 * size * before
    return d * (rows + 4 * (CHUNK + (MAX_KERNEL + 4) * SUBLANES))


def blocks_for(tokens: int, before: int, d: int, size: int, *, backward: bool = False) -> Blocks:
    """Tuned blocks, else the longest that leave a quarter of VMEM for the compiler."""
    found = tuning.tuned("short_conv", f"d{d}_{size}_{'backward' if backward else 'forward'}")
    block = found["tokens"] if found else MAX_TOKENS
    while not found and block > LANES:
        if vmem(block, before, d, size, backward=backward) <= tuning.vmem_limit() * 3 // 4:
            break
        block //= 2
    return Blocks(min(block, pl.cdiv(tokens, CHUNK) * CHUNK))


def history_rows(kernel: int, dilation: int) -> int:
    """Rows kept before a block: a power of two, so that they are whole tiles and divide a block."""
    return max(16, pl.next_power_of_2((kernel - 1) * dilation))


def forward(
    u: jax.Array,
    filters: jax.Array,
    bits: jax.Array,
    gain: jax.Array | None = None,
    tail: jax.Array | None = None,
    *,
    dilation: int,
    eps: float,
    out_dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """u + SiLU(convolution), masked.

    Args:
      u: [M, B, T, d]: streams outermost, as in the other kernels.
      filters: [M, K, d], half the taps times the gain; with a tail half the taps.
      bits: int32 [B, T], from openings.bits_of.
      gain: [M, d], only with a tail.
      tail: [M, B, L, d], normalised, times the gain; None: nothing before the first token.

    Returns:
      [M, B, T, d] in out_dtype (None: that of u).
    """
    m, b, t, d = u.shape
    kernel = filters.shape[1]
    out_dtype = out_dtype or u.dtype
    size = max(u.dtype.itemsize, jnp.dtype(out_dtype).itemsize)
    before = history_rows(kernel, dilation)
    blocks = blocks or blocks_for(t, before, d, size)
    bits = openings.padded(bits, blocks.tokens)
    tokens = pl.BlockSpec((None, None, blocks.tokens, d), lambda b, m, i: (m, b, i, 0))
    of_stream = pl.BlockSpec((None, kernel, d), lambda b, m, i: (m, 0, 0))
    operands = {
        "full": (
            openings.all_open(bits, blocks.chunk, kernel).reshape(-1),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ),
        "bits": (bits[:, None], pl.BlockSpec((None, 1, blocks.tokens), lambda b, m, i: (b, 0, i))),
        "u": (u, tokens),
        "filters": (filters.astype(jnp.float32), of_stream),
    }
    if tail is not None:
        assert gain is not None
        tail = jnp.pad(tail, ((0, 0), (0, 0), (before - tail.shape[2], 0), (0, 0)))
        operands["tail"] = (
            tail,
            pl.BlockSpec((None, None, before, d), lambda b, m, i: (m, b, 0, 0)),
        )
        operands["gain"] = (
            gain.astype(jnp.float32)[:, None],
            pl.BlockSpec((None, 1, d), lambda b, m, i: (m, 0, 0)),
        )
    scratch = {
        "x": pltpu.VMEM((d // LANES, before + blocks.tokens, LANES), jnp.float32),
        "open": pltpu.VMEM((blocks.tokens, LANES), jnp.int32),
    }
    names = (*operands, "out", *scratch)

    def program(*refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        _forward(refs, before=before, dilation=dilation, eps=eps, chunk=blocks.chunk)

    out_shape = jax.ShapeDtypeStruct(u.shape, out_dtype)
    again = {"bits": m, "filters": b, "gain": b}  # for every stream, for every sequence
    return pl.pallas_call(
        program,
        grid=(b, m, pl.cdiv(t, blocks.tokens)),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=tokens,
        out_shape=out_shape,
        cost_estimate=cost.estimate(
            2 * kernel * u.size,
            [out_shape],
            *((array, again.get(name, 1)) for name, (array, _) in operands.items()),
            transcendentals=u.size,
        ),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem_limit(),
        ),
        interpret=interpret,
        name="short_conv",
    )(*(array for array, _ in operands.values()))


def _forward(refs: dict[str, Any], *, before: int, dilation: int, eps: float, chunk: int) -> None:
    b, i = pl.program_id(0), pl.program_id(2)
    block, d = refs["u"].shape
    kernel = refs["filters"].shape[0]
    x = refs["x"]
    refs["open"][...] = down_the_rows(refs["bits"][...])

    @pl.when(i > 0)
    def _continue() -> None:
        def keep(j: jax.Array, lanes: Any) -> None:
            x[j, :before] = x[j, block:]

        for_each_column(d, keep)

    if "tail" in refs:

        @pl.when(i == 0)
        def _begin() -> None:
            def load(j: jax.Array, lanes: Any) -> None:
                x[j, :before] = refs["tail"][:, lanes].astype(jnp.float32)

            for_each_column(d, load)

    def step(c: jax.Array, carry: None) -> None:
        first = pl.multiple_of(c * chunk, chunk)
        rows = pl.ds(first, chunk)
        r = reciprocal_rms(refs["u"], rows, eps)

        def compute(bits: jax.Array | None) -> None:
            def column(j: jax.Array, lanes: Any) -> None:
                u = refs["u"][rows, lanes].astype(jnp.float32)
                own = u * r
                if "gain" in refs:
                    own *= refs["gain"][:, lanes]
                    # Rounded as in the new tail: results do not depend on how a sequence is split.
                    own = own.astype(refs["tail"].dtype).astype(jnp.float32)
                x[j, pl.ds(before + first, chunk)] = own
                h = own * refs["filters"][kernel - 1 :, lanes]
                for k in range(kernel - 1):
                    back = (kernel - 1 - k) * dilation
                    past = x[j, pl.ds(before + first - back, chunk)]
                    h += when_open(bits, k, past) * refs["filters"][k : k + 1, lanes]
                out = when_open(bits, kernel, u + h * (1 + jnp.tanh(h)))
                refs["out"][rows, lanes] = out.astype(refs["out"].dtype)

            for_each_column(d, column)

        full = refs["full"][(b * pl.num_programs(2) + i) * (block // chunk) + c] > 0
        pl.when(full)(lambda: compute(None))
        pl.when(jnp.logical_not(full))(lambda: compute(refs["open"][rows]))

    lax.fori_loop(0, block // chunk, step, None)


# ---- shared with the backward pass ---------------------------------------------------------------


def for_each_column(d: int, body: Any, carry: Any = None) -> Any:
    """carry = body(j, lanes[, carry]) for every column of 128 lanes of d, the j-th in `x`."""

    columns = d // LANES
    at_once = math.gcd(columns, UNROLL)

    def step(first: jax.Array, carry: Any) -> Any:
        for k in range(at_once):
            j = first * at_once + k
            lanes = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
            carry = body(j, lanes) if carry is None else body(j, lanes, carry)
        return carry

    return lax.fori_loop(0, columns // at_once, step, carry)


def down_the_rows(bits: jax.Array) -> jax.Array:
    """[1, tokens] -> [tokens, 128], the same in all lanes."""
    return jnp.transpose(jnp.broadcast_to(bits, (LANES, bits.shape[1])))


def when_open(bits: jax.Array | None, k: int, x: jax.Array) -> jax.Array:
    """x, or 0 where bit k is not set; bits None: all are set. Not a product: x may be NaN there."""
    return x if bits is None else jnp.where((bits & (1 << k)) != 0, x, 0)


def reciprocal_rms(u: Any, rows: Any, eps: float) -> jax.Array:
    """1 / sqrt(mean(u^2) + eps) of the rows: [rows, 128], the same in all lanes."""
    d = u.shape[1]

    def add(j: jax.Array, lanes: Any, total: jax.Array) -> jax.Array:
        x = u[rows, lanes].astype(jnp.float32)
        return total + x * x

    total = for_each_column(d, add, jnp.zeros((rows.size, LANES), jnp.float32))
    mean = jnp.sum(total, axis=1, keepdims=True) * (1 / d)
    return jnp.broadcast_to(lax.rsqrt(mean + eps), total.shape)
