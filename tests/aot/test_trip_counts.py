"""Trip counts: what XLA's CPU compiler writes down must also be found without it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from engram_jax.aot.hlo_parser import parse_hlo
from engram_jax.aot.trip_counts import trip_count


def loops(text):
    """Trip counts of all loops of a module, by the last named scope in their op_name."""
    module = parse_hlo(text)
    return {
        re.sub(r"/(while|body|closed_call)", "", i.op_name).split("/")[-1]: trip_count(module, i, c)
        for c in module.computations.values()
        for i in c.instructions.values()
        if i.opcode == "while"
    }


def program(x):
    def body(c, _):
        return jnp.sin(c @ c), None

    def outer(c, _):
        with jax.named_scope("inner"):
            return lax.scan(body, c, None, length=5)[0], None

    with jax.named_scope("outer"):
        x = lax.scan(outer, x, None, length=3)[0]
    with jax.named_scope("down"):
        x = lax.while_loop(lambda s: s[0] > 4, lambda s: (s[0] - 3, jnp.cos(s[1] @ s[1])), (20, x))[
            1
        ]
    with jax.named_scope("data"):
        x = lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: body(c, None)[0], x)
    with jax.named_scope("dynamic"):
        return lax.fori_loop(0, x[0, 0].astype(jnp.int32), lambda i, c: body(c, None)[0], x)


# 20, 17, 14, 11, 8, 5 are greater than 4.
EXPECTED = {"outer": 3, "inner": 5, "down": 6, "data": None, "dynamic": None}


def test_counts_with_and_without_xla_saying_so():
    text = jax.jit(program).lower(jnp.ones((64, 64))).compile().as_text()
    assert text.count('"known_trip_count"') >= 3
    assert loops(text) == EXPECTED
    silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert "known_trip_count" not in silent
    assert loops(silent) == EXPECTED


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_counts_in_a_tpu_program(shard_mapped, name):
    text = shard_mapped(name, program, (256, 256))
    assert "known_trip_count" not in text  # else the counter need not be followed any more
    assert loops(text) == EXPECTED
