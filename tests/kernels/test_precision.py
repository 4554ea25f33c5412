"""float32 products of the plain forms ask for float32: a TPU's default rounds factors to bfloat16.

No CPU shows the difference, so what is asked for is read in the program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.lax import Precision

from kernels_pallas.dispatch import REFERENCE
from kernels_pallas.engram_gate.api import engram_gate
from kernels_pallas.engram_gate.quantise import RECIPES
from kernels_pallas.mhc.api import mhc_merge, mhc_pre

T, C, M, D = 8, 128, 4, 128
COEFFICIENTS = 2 * M + M * M


def products(jaxpr):
    """(dtypes of the factors, precisions) of every product of a program, inner programs' too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {x.aval.dtype for x in equation.invars}, equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def asked(function, *shapes):
    """Of function and gradient, for arrays of these (shape, dtype): the number of products, and the
    precisions of those in float32."""

    def both(*args):
        out, pullback = jax.vjp(function, *args)
        return pullback(out)

    jaxpr = jax.make_jaxpr(both)(*(jnp.zeros(shape, dtype) for shape, dtype in shapes)).jaxpr
    found = list(products(jaxpr))
    assert all(len(dtypes) == 1 for dtypes, _ in found)
    wide = [set(p or [None]) for dtypes, p in found if dtypes == {np.dtype("float32")}]
    return len(found), set().union(*wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_gate(recipe, dtype):
    gate = functools.partial(engram_gate, eps=1e-6, recipe=recipe, implementation=REFERENCE)
    shapes = [((T, C), dtype), ((C, M + 1, D), dtype), ((T, M, D), dtype), ((M, D), "float32")]
    number, precisions = asked(gate, *shapes)
    assert number >= 3
    assert precisions == (set() if dtype == "bfloat16" and not recipe else {Precision.HIGHEST})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mhc(dtype):
    """At least the tfloat32 of the paper: three bfloat16 products on a TPU."""
    options = {"iterations": 2, "eps": 1e-6, "transpose": False, "implementation": REFERENCE}
    parameters = [(M * D, COEFFICIENTS), (COEFFICIENTS,), (3,)]
    shapes = [((T, M, D), dtype), *((shape, "float32") for shape in parameters)]
    number, precisions = asked(functools.partial(mhc_pre, **options), *shapes)
    assert number >= 4 and precisions == {Precision.HIGH}
    merge = functools.partial(mhc_merge, implementation=REFERENCE)
    shapes = [((T, M, D), dtype), ((T, D), dtype), ((T, M), "float32"), ((T, M, M), "float32")]
    assert asked(merge, *shapes) == (2, {Precision.HIGH})
