"""What every kernel declares that it costs, against what its program does, without compiling.

Bytes: by walking the grid and its index maps (kernels_pallas/traffic.py). FLOPs: by running the
scalars of the kernel's own program for every step of the grid and adding up the products that its
branches then reach (`products`); of kernels without products, by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from engram_jax.aot import prices
from engram_jax.aot.hlo_parser import parse_instruction
from engram_jax.aot.one_chip import compile_operation
from kernels_pallas import traffic
from kernels_pallas.dispatch import PALLAS
from kernels_pallas.engram_gate import shapes as gate_shapes
from kernels_pallas.engram_gate.api import engram_gate
from kernels_pallas.mhc import shapes as mhc_shapes
from kernels_pallas.mhc.api import mhc_merge, mhc_pre
from kernels_pallas.short_conv import shapes as conv_shapes
from kernels_pallas.short_conv.api import short_conv

OPTIONS = {"iterations": 2, "eps": 1e-6, "transpose": False}
B, T, M, D, C, K = 2, 512, 4, 256, 384, 4  # tokens of whole blocks
LONG = 8192  # tokens in several passes over the gate's weights
GATE = gate_shapes.Shape(LONG, C, M, D)
HYPER = mhc_shapes.Shape(T, M, D)
CONV = conv_shapes.Shape(B, T, M, D, K, 3)
PRODUCTS = {  # multiply-adds of the matrix unit, padded as they are: 4 streams have 24
    # coefficients, three parts of which take 3 x 24 + 1 -> 128 columns, or 3 x 24 -> 80 rows
    "engram_gate": LONG * C * (M + 1) * D,
    "engram_gate_backward": LONG * C * (M + 1) * D,
    "mhc_pre": T * M * D * 128,
    "mhc_pre_backward": T * M * D * (128 + 80),
}
BY_HAND = {  # multiply-adds of vectors: one for each stream that is mixed, for each tap
    "mhc_merge": T * D * M * (M + 1),
    "mhc_merge_backward": 2 * T * D * M * (M + 1),
    "short_conv": K * B * T * M * D,
    "short_conv_backward": 3 * K * B * T * M * D,
}


def with_gradients(function, kinds):
    """function(arguments), and the gradients of those that are floating-point numbers."""

    def both(*args):
        trained = [i for i, kind in enumerate(kinds) if kind == "f"]

        def of(*values):
            full = list(args)
            for i, value in zip(trained, values, strict=True):
                full[i] = value
            return function(*full)

        out, pullback = jax.vjp(of, *(args[i] for i in trained))
        return pullback(jax.tree.map(jnp.ones_like, out))

    return both


OPERATIONS = {
    "engram_gate": (functools.partial(engram_gate, eps=1e-6), gate_shapes.arrays, GATE),
    "mhc_pre": (functools.partial(mhc_pre, **OPTIONS), mhc_shapes.pre_arrays, HYPER),
    "mhc_merge": (mhc_merge, mhc_shapes.merge_arrays, HYPER),
    "short_conv": (functools.partial(short_conv, dilation=3, eps=1e-5), conv_shapes.arrays, CONV),
}


@functools.cache
def kernels(operation, dtype):
    """name -> (its pallas_call equation, bytes moved by its grid), of an operation's step."""
    function, arrays, shape = OPERATIONS[operation]
    arguments = arrays(shape, dtype)
    kinds = ["f" if jnp.issubdtype(a.dtype, jnp.floating) else "i" for a in arguments]
    step = with_gradients(functools.partial(function, implementation=PALLAS), kinds)
    found = {}
    for equation, times in traffic._kernels(jax.make_jaxpr(step)(*arguments).jaxpr, 1):
        assert times == 1
        mapping = equation.params["grid_mapping"]
        moved = [traffic._block_bytes(block, mapping.grid) for block in mapping.block_mappings]
        found[str(equation.params["name"])] = equation, sum(moved)
    return found


def kernel(name, dtype=jnp.bfloat16):
    return kernels(name.removesuffix("_backward"), dtype)[name]


def products(equation):
    """Multiply-adds of all products that the kernel's program reaches over its grid."""
    mapping = equation.params["grid_mapping"]
    steps = itertools.product(*(range(n) for n in mapping.grid))
    body = equation.params["jaxpr"]
    return sum(_products(body, {}, dict(enumerate(step)), mapping.grid) for step in steps)


def _products(jaxpr, known, step, grid):
    """known: values of variables that are known numbers."""

    def value(atom):
        return atom.val if hasattr(atom, "val") else known.get(atom)

    total = 0
    for e in jaxpr.eqns:
        name, given = e.primitive.name, [value(v) for v in e.invars]
        inner = [getattr(j, "jaxpr", j) for j in jax.tree.leaves(
            list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ) if hasattr(getattr(j, "jaxpr", j), "eqns")]  # fmt: skip
        if name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            depth = math.prod(e.invars[0].aval.shape[k] for k in contracted)
            total += depth * math.prod(e.outvars[0].aval.shape)
        elif name == "program_id":
            known[e.outvars[0]] = np.int32(step[e.params["axis"]])
        elif name == "cond":
            assert given[0] is not None or not any(_has_products(j) for j in inner)
            chosen = inner if given[0] is None else [e.params["branches"][int(given[0])].jaxpr]
            for branch in chosen:
                bound = dict(zip(branch.invars, given[1:], strict=True))
                total += _products(branch, _only(bound), step, grid)
        elif name == "scan":
            (body,) = inner
            consts = e.params["num_consts"]
            bound = _only(dict(zip(body.invars[:consts], given[:consts], strict=True)))
            total += e.params["length"] * _products(body, bound, step, grid)
        elif name in ("pjit", "jit", "closed_call", "custom_jvp_call", "while"):
            for body in inner:
                assert name != "while" or not _has_products(body)
                bound = {}
                if len(body.invars) == len(given):
                    bound = _only(dict(zip(body.invars, given, strict=True)))
                total += _products(body, bound, step, grid)
                if name != "while":
                    outs = [bound.get(v, getattr(v, "val", None)) for v in body.outvars]
                    known |= _only(dict(zip(e.outvars, outs, strict=True)))
        elif all(v is not None and np.ndim(v) == 0 for v in given) and given and not inner:
            results = e.primitive.bind(*given, **e.params)
            results = results if e.primitive.multiple_results else [results]
            known |= dict(zip(e.outvars, map(np.asarray, results), strict=True))
    return total


def _only(values):
    return {k: v for k, v in values.items() if v is not None}


def _has_products(jaxpr):
    return "dot_general" in str(jaxpr)


@pytest.mark.parametrize("name", [*PRODUCTS, *BY_HAND])
def test_flops_and_bytes(name):
    equation, moved = kernel(name)
    told = equation.params["cost_estimate"]
    assert equation.params["grid_mapping"].grid[0] > 1  # passes over weights, or sequences
    assert told.bytes_accessed == moved
    assert told.flops == 2 * (PRODUCTS | BY_HAND)[name]
    assert (products(equation) == PRODUCTS[name]) if name in PRODUCTS else not products(equation)


@pytest.mark.parametrize(("name", "columns"), [("mhc_pre", 3 * 128), ("mhc_pre_backward", 3 * 208)])
def test_float32_streams_are_multiplied_in_three_parts(name, columns):
    equation, moved = kernel(name, jnp.float32)
    told = equation.params["cost_estimate"]
    assert told.flops == 2 * products(equation) == 2 * T * M * D * columns
    assert told.bytes_accessed == moved


def test_no_kernel_is_without_one():
    root = Path(kernels_pallas.__file__).parent
    files = {f: f.read_text() for f in root.rglob("*.py")}
    calls = {str(f.relative_to(root)): t.count("pl.pallas_call(") for f, t in files.items()}
    told = {str(f.relative_to(root)): t.count("cost_estimate=") for f, t in files.items()}
    assert sum(calls.values()) > len(PRODUCTS | BY_HAND) and calls == told


def test_the_prediction_reads_it_from_the_text(tpu_slice):
    """The numbers that libtpu's text has are those that the kernel declares."""
    topology, _ = tpu_slice("v5p:2x2x1")
    arguments = mhc_shapes.merge_arrays(HYPER, jnp.bfloat16)
    merge = functools.partial(mhc_merge, implementation=PALLAS)
    text = compile_operation(topology, merge, *arguments).text
    (line,) = re.findall(r"^.*custom_call_target=\"tpu_custom_call\".*$", text, re.MULTILINE)
    call = parse_instruction(line)
    told = kernel("mhc_merge")[0].params["cost_estimate"]
    found = [prices.declared(call, key) for key in ("flops", "bytes_accessed")]
    assert found == [told.flops, told.bytes_accessed]
