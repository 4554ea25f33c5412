"""scripts/same_program.py: what its canonical text keeps of a program, and what it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from scripts import same_program
from scripts.same_program_text import canonical

ROOT = Path(__file__).resolve().parent.parent
X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def lowered(function, *args):
    """Lowered for a TPU, none of which, nor its compiler, needs to be there."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))


def text(function, *args):
    return canonical(lowered(function, *(args or (X,))).compiler_ir())


def network(constant=3.0, dtype=jnp.float32):
    @jax.jit
    def inner(x):
        return jnp.where(x > 0, x, constant).astype(dtype)

    def outer(x):
        return {"result": inner(x) @ inner(x).T}

    return outer


def renamed(constant=3.0, dtype=jnp.float32):
    """The same program under other names, elsewhere."""

    @jax.jit
    def another(y):
        return jnp.where(y > 0, y, constant).astype(dtype)

    def function(y):
        return {"other": another(y) @ another(y).T}

    return function


def kernel(constant=2.0, dtype=jnp.float32):
    def body(x_ref, out_ref):
        out_ref[...] = (x_ref[...] * constant).astype(dtype)

    shape = jax.ShapeDtypeStruct(X.shape, dtype)
    return lambda x: pl.pallas_call(body, out_shape=shape, name="one")(x)


def renamed_kernel(constant=2.0, dtype=jnp.float32):
    def other_body(source, target):
        target[...] = (source[...] * constant).astype(dtype)

    shape = jax.ShapeDtypeStruct(X.shape, dtype)
    return lambda x: pl.pallas_call(other_body, out_shape=shape, name="two")(x)


@pytest.mark.parametrize(("one", "other"), [(network, renamed), (kernel, renamed_kernel)])
def test_names_and_places_do_not_matter_and_the_rest_does(one, other):
    assert lowered(one(), X).as_text() != lowered(other(), X).as_text()
    expected = text(one())
    assert text(other()) == expected
    assert text(other(constant=2.5)) != expected
    assert text(other(dtype=jnp.bfloat16)) != expected


def test_a_kernel_is_compared_as_text():
    found = text(kernel())
    assert "// kernel 0\n" in found and "arith.mulf" in found
    # All that differs is in the body, which the module has as bytecode.
    module, _, body = found.partition("// kernel 0\n")
    other_module, _, other_body = text(kernel(constant=2.5)).partition("// kernel 0\n")
    assert module == other_module and body != other_body


def test_a_module_may_be_given_as_text():
    module = lowered(network(), X)
    assert canonical(module.as_text(debug_info=True)) == canonical(module.compiler_ir())


def test_a_sharding_matters(tpu_slice):
    _, mesh = tpu_slice("v5e:2x2")

    def under(*spec):
        cut = NamedSharding(mesh, PartitionSpec(*spec))
        x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=cut)
        return canonical(jax.jit(lambda x: x + 1).lower(x).compiler_ir())

    assert under("x") == under("x")
    assert len({under(), under("x"), under(None, "x")}) == 3


def test_the_control_s_changes_can_be_made(tmp_path):
    for package in ("engram_jax", "kernels_pallas"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for control in same_program.CONTROLS:
        control.apply(tmp_path)
        with pytest.raises(ValueError, match="must be once in one"):
            control.apply(tmp_path)


def test_where_texts_part_is_shown(capsys):
    long = "x" * 1000
    assert not same_program.same("what", f"1\n{long}a{long}\n3", f"1\n{long}b{long}\n3\n4")
    first, where, minus, plus, *rest = capsys.readouterr().out.splitlines()
    assert first == "DIFFERENT  what" and where.strip() == "line 2, column 1001:"
    assert (
        minus.strip() == f"- {'x' * 80}a{'x' * 79}" and plus.strip() == f"+ {'x' * 80}b{'x' * 79}"
    )
    assert [line.strip() for line in rest] == ["line 4, column 1:", "-", "+ 4"]
    assert not same_program.same("what", "%1 = a\n%c_2 = b %1#0", "%3 = b %c#1\n%4 = a")
    assert capsys.readouterr().out.startswith("DIFFERENT  what: the same lines in another order\n")
    assert same_program.same("what", long, long)
    assert capsys.readouterr().out == "same       what (1,000 bytes)\n"


def test_metrics_are_compared_to_the_last_bit_and_times_are_not(tmp_path):
    def wrote(loss, seconds):
        records = [
            {"step": step, "time": seconds, "loss": loss, "step_seconds/p50": seconds, "mfu": 1.0}
            for step in (1, 2)
        ]
        lines = "\n".join(map(json.dumps, records))
        (tmp_path / "metrics.jsonl").write_text(lines)
        return same_program.metrics(tmp_path)

    expected = wrote(0.1, 1.0)
    assert wrote(0.1, 2.0) == expected
    assert wrote(float(np.nextafter(0.1, 1)), 1.0) != expected
    assert same_program.metrics(tmp_path, after=1).splitlines()[0].startswith("2 loss")
