"""The gate of Engram (paper, equations 3, 4 and 6): rows of the memory, projected and gated.

What is computed: reference.py, line by line; the equations: engram_jax/layers/engram.py; how the
kernels do it: README.md.
"""

from __future__ import annotations

import math

import jax

from kernels_pallas import dispatch
from kernels_pallas.dispatch import AUTO, GPU, TPU
from kernels_pallas.engram_gate import gpu, reference, tpu, tpu_backward, vjp
from kernels_pallas.engram_gate.quantise import RECIPES, Quantised


def engram_gate(
    rows: jax.Array | Quantised,
    weights: jax.Array | Quantised,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    eps: float,
    recipe: str | None = None,
    implementation: str = AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The gated value of every branch, and the gates.

    Args:
      rows: e, [..., C] with C = d_mem, float32 or bfloat16, in which the projection is computed;
        or FP8.
      weights: [C, M + 1, d], keys of the M branches, then the value; used in the rows' dtype; or
        FP8. FP8 arguments are constants: they get no gradient.
      streams: h, [..., M, d].
      gain: [M, d], product of the gains of both norms.
      bias: [M + 1, d] or None.
      mask: bool [...] or None; False = a token without memory: gate and output are 0.
      eps: of both norms.
      recipe: None, or how plain rows and weights are rounded to FP8 for the forward projection
        (quantise.RECIPES); gradients pass through the rounding.
      implementation: of dispatch.IMPLEMENTATIONS.

    Returns:
      ([..., M, d] in the streams' dtype, gates [..., M] in float32, or float64).

    Raises:
      dispatch.UnsupportedError: "pallas", and the kernel cannot take these arguments.
      ValueError: an unknown recipe or implementation, two different recipes, or shapes that do not
        fit together.
    """
    recipe = _recipe(rows, weights, recipe)
    values = rows.values if isinstance(rows, Quantised) else rows
    c, (m, d) = values.shape[-1], streams.shape[-2:]
    _check_shapes(values.shape, weights, streams.shape, gain, bias, mask)
    mixed = isinstance(rows, Quantised) and not isinstance(weights, Quantised)
    lead = streams.shape[:-2]
    tokens = math.prod(lead)
    nothing = "there are no tokens" if tokens == 0 else None
    limits = {
        TPU: nothing
        or tpu.limit(c, d, m, values.dtype, streams.dtype, recipe, mixed)
        or tpu_backward.too_large(c, d, m, (max(2, values.dtype.itemsize), streams.dtype.itemsize)),
        GPU: nothing
        or gpu.limit(c, d, m, values.dtype, streams.dtype, recipe, mixed)
        or (gpu.UNMEASURED if implementation == AUTO else None),
    }
    choice = dispatch.choose("engram_gate", implementation, limits)
    if not isinstance(rows, Quantised) and not isinstance(weights, Quantised):
        weights = weights.astype(rows.dtype)
    if choice.kernel is None:
        return reference.engram_gate(
            rows, weights, streams, gain, bias, mask, eps=eps, recipe=recipe
        )
    rows = jax.tree.map(lambda x: x.reshape(tokens, x.shape[-1]), rows)
    out, gate = vjp.engram_gate(
        rows,
        weights,
        streams.reshape(tokens, m, d),
        gain,
        bias,
        None if mask is None else mask.reshape(tokens),
        eps,
        recipe,
        choice,
    )
    return out.reshape(*lead, m, d), gate.reshape(*lead, m)


def _check_shapes(
    rows: tuple[int, ...],
    weights: jax.Array | Quantised,
    streams: tuple[int, ...],
    gain: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> None:
    (*lead, m, d), c = streams, rows[-1]
    found = weights.values if isinstance(weights, Quantised) else weights
    expected = {
        "rows": (rows, (*lead, c)),
        "weights": (found.shape, (c, m + 1, d)),
        "gain": (gain.shape, (m, d)),
        "bias": (None if bias is None else bias.shape, (m + 1, d)),
        "mask": (None if mask is None else mask.shape, tuple(lead)),
    }
    for name, (given, wanted) in expected.items():
        if given is not None and given != wanted:
            raise ValueError(f"engram_gate: {name} {given} for streams {streams}: not {wanted}")


def _recipe(
    rows: jax.Array | Quantised, weights: jax.Array | Quantised, recipe: str | None
) -> str | None:
    given = {recipe, *(x.recipe for x in (rows, weights) if isinstance(x, Quantised))}
    given.discard(None)
    if len(given) > 1:
        raise ValueError(f"engram_gate: rows and weights with different recipes: {sorted(given)}")
    if not given <= set(RECIPES):
        raise ValueError(f"engram_gate: recipe {given.pop()!r} is not one of {RECIPES}")
    return given.pop() if given else None
