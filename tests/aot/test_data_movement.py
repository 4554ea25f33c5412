"""Collectives and their bytes, against shapes worked out by hand: 4 devices, x [1024, 512] each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from engram_jax.aot.data_movement import collectives, large_copies
from engram_jax.aot.hlo_parser import Array, parse_hlo, parse_instruction

SLICES = ("v5e:2x2", "v5p:2x2x1")
X = 1024 * 512 * 4  # bytes of x


def one(text):
    found = collectives(text)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(
    ("kind", "f", "size"),
    [
        ("all-gather", lambda x: lax.all_gather(x, "x", tiled=True) * 2, 3 * X),
        ("all-reduce", lambda x: lax.psum(x, "x"), 2 * 3 * X // 4),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "x", tiled=True), 3 * X // 4),
        ("all-to-all", lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True), 3 * X // 4),
        ("collective-permute", lambda x: lax.ppermute(x, "x", [(0, 1), (1, 2), (2, 3), (3, 0)]), X),
    ],
)
def test_one_of_each(shard_mapped, name, kind, f, size):
    def scoped(x):
        with jax.named_scope("exchange"):
            return f(x)

    found = one(shard_mapped(name, scoped, (1024, 512)))
    assert (found.kind, found.count, found.bytes) == (kind, 1, size)
    assert found.padded_bytes == size  # 1024 and 512 are whole tiles
    assert "exchange" in found.name
    assert not found.unknown_trips and not found.conditional


@pytest.mark.parametrize("name", SLICES)
def test_an_asynchronous_pair_counts_once(shard_mapped, name):
    def f(x, w):
        return lax.all_to_all(x, "x", 0, 0, tiled=True) * 2, jnp.tanh(w @ w) @ w

    options = {"xla_tpu_enable_async_all_to_all": True}
    text = shard_mapped(name, f, (1024, 512), (512, 512), options=options)
    assert "async-start(" in text and "async-done(" in text
    found = one(text)
    assert (found.kind, found.count, found.bytes) == ("all-to-all", 1, 3 * X // 4)
    assert "all_to_all" in found.name


def test_groups_of_some_devices_and_padding(shard_mapped):
    """[1024, 80]: 80 of 128 lanes; pairs of devices: half of it comes from the other one."""

    def f(x):
        return lax.all_to_all(x, "x", 0, 0, tiled=True, axis_index_groups=[[0, 2], [1, 3]])

    found = one(shard_mapped("v5p:2x2x1", f, (1024, 80)))
    assert found.group_size == 2
    assert found.bytes == 1024 * 80 * 4 // 2
    assert found.padded_bytes in (found.bytes, 1024 * 128 * 4 // 2)  # by the layout XLA chose


@pytest.mark.parametrize("name", SLICES)
def test_loops_and_branches(shard_mapped, name):
    def exchange(x):
        return lax.all_to_all(jnp.tanh(x @ x[:512]), "x", 0, 0, tiled=True)

    def f(x):
        with jax.named_scope("outer"):
            x = lax.scan(
                lambda c, _: (lax.scan(lambda d, _: (exchange(d), None), c, None, 5)[0], None),
                x,
                None,
                3,
            )[0]
        with jax.named_scope("overflow"):
            x = lax.while_loop(lambda c: jnp.sum(c) < 9, exchange, x)
        with jax.named_scope("maybe"):
            return lax.cond(jnp.sum(x[0]) > 0, exchange, lambda c: c * 3, x)

    found = {
        (c.count, c.bytes, c.unknown_trips, c.conditional)
        for c in collectives(shard_mapped(name, f, (1024, 512)))
        if c.kind == "all-to-all"
    }
    once = 3 * X // 4
    assert found == {
        (15, 15 * once, False, False),
        (1, once, True, False),
        (1, once, False, True),
    }


def sharded_layer(x, w):
    """Weights gathered beside independent work, a gradient scattered: bfloat16, w [D / n, D]."""
    h = jnp.tanh(x @ x.T)
    whole = lax.all_gather(w, "x", tiled=True)
    y = jnp.tanh(x @ whole) @ whole
    return y, lax.psum_scatter(jnp.sin(h) @ x, "x", tiled=True)


def test_a_collective_on_a_sparse_core_counts_once(shard_mapped):
    """A tpu7x gathers in an async wrapper around a custom call around the all-gather."""
    text = shard_mapped("tpu7x:2x2x1", sharded_layer, (512, 512), (64, 512), dtype=jnp.bfloat16)
    assert 'async_execution_thread="sparsecore"' in text
    found = {c.kind: (c.count, c.bytes) for c in collectives(text)}
    assert found["all-gather"] == (1, 7 * 64 * 512 * 2)
    assert found["reduce-scatter"] == (1, 7 * 64 * 512 * 2)


def test_a_collective_spread_over_fusions_counts_once(shard_mapped):
    """A v5e hides this all-gather in matrix products, each of which names it again."""
    text = shard_mapped("v5e:2x2", sharded_layer, (512, 512), (128, 512), dtype=jnp.bfloat16)
    assert text.count(" all-gather(") > 1 and "AsyncCollectiveStart" in text
    found = [c for c in collectives(text) if c.kind == "all-gather"]
    assert [(c.count, c.bytes) for c in found] == [(1, 3 * 128 * 512 * 2)]


def test_a_reduce_scatter_written_as_all_reduce(shard_mapped):
    """A v5p reduces some more rows than 4 x 512, keeps its part, and moves the seams."""
    text = shard_mapped("v5p:2x2x1", sharded_layer, (2048, 2048), (512, 2048), dtype=jnp.bfloat16)
    assert "all-reduce-scatter" in text
    found = {c.kind: c.bytes for c in collectives(text)}
    needed = 3 * 512 * 2048 * 2
    assert "all-reduce" not in found
    assert needed <= found["reduce-scatter"] <= 1.1 * needed


HAND = """HloModule hand, replica_count=2, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[10,128]) -> f32[10,128] {
  %p = f32[10,128]{1,0:T(8,128)} parameter(0)
"""


@pytest.mark.parametrize(
    ("line", "kind", "size", "padded"),
    [
        (  # two operands, groups of 4 as iota: 2 x 3/4 of (5120 + 512) bytes
            "(f32[10,128]{1,0:T(8,128)}, f32[128]{0:T(128)}) all-reduce(%p, %p), "
            "replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
            "all-reduce",
            8448,
            13056,  # 10 rows lie in 16
        ),
        (  # no groups: all 8 devices
            "f32[10,128]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add",
            "all-reduce",
            8960,
            8960,
        ),
        (  # (inputs, outputs): 3/4 of 20480
            "(f32[10,128]{1,0}, f32[40,128]{1,0}) all-gather-start(%p), "
            "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            15360,
            15360,
        ),
        (  # four parts of 1280 bytes, one of them its own
            "(bf16[5,128], bf16[5,128], bf16[5,128], bf16[5,128]) all-to-all(%p, %p, %p, %p), "
            "replica_groups={{0,1,2,3},{4,5,6,7}}",
            "all-to-all",
            3840,
            3840,
        ),
        (  # groups as axes of a mesh: 7/8 of 20480, all of 'a' and a part of 'b'
            "f32[40,128]{1,0} all-gather(%p), replica_groups=mesh['a'=4,'b'=4] {'a','b':(1)2}, "
            "use_global_device_ids=true, dimensions={0}",
            "all-gather",
            17920,
            17920,
        ),
        (  # its sizes are data: the room of the output is the bound
            "f32[64,128] ragged-all-to-all(%p, %p, %p, %p, %p, %p), replica_groups={{0,1}}",
            "ragged-all-to-all",
            32768,
            32768,
        ),
    ],
)
def test_forms_of_the_text(line, kind, size, padded):
    found = one(f"{HAND}  ROOT %it = {line}\n}}\n")
    assert (found.kind, found.bytes, found.padded_bytes) == (kind, size, padded)
    assert found.name == "it"


def test_groups_in_an_unknown_form_are_an_error():
    line = "f32[10,128]{1,0} all-reduce(%p), replica_groups=<new>, to_apply=%add"
    with pytest.raises(ValueError, match="it: replica_groups=<new>, to_apply"):
        collectives(f"{HAND}  ROOT %it = {line}\n}}\n")


def test_an_element_of_a_tuple_written_short():
    text = f"""{HAND}  %two = (f32[10,128], (s32[4], f32[2,3])) fusion(%p), kind=kLoop, calls=%add
  ROOT %it = f32[2,3] negate(%two#1#1)
}}
"""
    found = parse_hlo(text).entry.instructions
    assert list(found) == ["p", "two", "two#1", "two#1#1", "it"]
    assert found["it"].operands == ("two#1#1",)
    inner = found["two#1#1"]
    assert (inner.opcode, inner.operands, inner.attribute("index")) == (
        "get-tuple-element",
        ("two#1",),
        "1",
    )
    assert inner.shape == Array("f32", (2, 3)) and not inner.root


def test_an_instruction_with_everything():
    parsed = parse_instruction(
        "  ROOT %x.1 = ((bf16[4,8]{1,0:T(8,128)(2,1)S(1)}), pred[], /*index=2*/u32[]{:S(2)}) "
        'async-start(%a.2, /*index=1*/%b), calls=%c-3, metadata={op_name="jit(f)/g(h)" id=2}, '
        'backend_config={"a":{"n":["7"]}}'
    )
    assert parsed.name == "x.1" and parsed.root and parsed.opcode == "async-start"
    assert parsed.operands == ("a.2", "b") and parsed.called == ("c-3",)
    assert parsed.op_name == "jit(f)/g(h)" and parsed.backend_config == {"a": {"n": ["7"]}}
    bf16 = Array("bf16", (4, 8), (1, 0), ((8, 128), (2, 1)), 1)
    assert parsed.shape == ((bf16,), Array("pred", ()), Array("u32", (), (), (), 2))
    assert (bf16.bytes, bf16.padded_bytes) == (64, 2048)


COPIES = """HloModule copies, input_output_alias={ {}: (0, {}, may-alias) }

%scattered (t: f32[100,80], i: s32[4], g: f32[4,80]) -> f32[100,80] {
  %t = f32[100,80] parameter(0)
  %i = s32[4] parameter(1)
  %g = f32[4,80] parameter(2)
  ROOT %s = f32[100,80] scatter(%t, %i, %g), to_apply=%add
}

ENTRY %main (p: f32[100,80], i: s32[4], g: f32[4,80]) -> f32[100,80] {
  %p = f32[100,80] parameter(0)
  %i = s32[4] parameter(1)
  %g = f32[4,80] parameter(2)
  %b = f32[80,100] bitcast(%p)
  %f = f32[100,80] fusion(%p, %i, %g), kind=kLoop, calls=%scattered
  %u = ((), (), u32[]) async-start(), calls=%scattered
"""
STARTED = "  %v = ((f32[4,80]), f32[100,80], u32[]) async-start(%g), calls=%scattered\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("f32[100,80] scatter(%f, %i, %g)", False),  # and neither the fusion nor the bitcast
        ("f32[100,80] copy(%f)", True),
        ("(f32[100,80], f32[100,80], u32[]) copy-start(%f)", True),
        ("f32[80,100] transpose(%f), dimensions={1,0}", True),
        ("bf16[100,80] convert(%f)", True),
        ("f32[1000,8] reshape(%f)", True),
        ("f32[400,80] all-gather(%f), replica_groups={{0,1,2,3}}", True),
        ("f32[400,80] broadcast(%f)", False),  # large, but no table: that is min_bytes' matter
        ("f32[100,80] add(%f, %f)", True),
        ("((f32[100,80]), f32[4,80], u32[]) async-start(%f), calls=%scattered", False),
        ("((f32[4,80]), f32[100,80], u32[]) async-start(%g), calls=%scattered", True),
        ("((f32[4,80]), f32[100,80], u32[]) async-update(%u, %g)", True),
        ("((f32[4,80]), f32[100,80], u32[]) async-update(%v, %g)", False),  # %v has filled it
        (
            "f32[100,80] custom-call(%f), output_to_operand_aliasing={{}: (0, {})}",
            False,
        ),
        (
            '(f32[4], f32[100,80]) fusion(%f, %i), calls=%scattered, backend_config={"'
            'aliasing_operands":{"lists":[{"indices":["0","3"]}]}}',  # operands 0, 1; results 2, 3
            False,
        ),
        (
            '(f32[4], f32[100,80]) fusion(%f, %i), calls=%scattered, backend_config={"'
            'aliasing_operands":{"lists":[{"indices":["0","2"]}]}}',
            True,
        ),
    ],
)
def test_what_is_a_copy(line, found):
    started = STARTED if "%v" in line else ""
    copies = large_copies(f"{COPIES}{started}  ROOT %it = {line}\n}}\n", [(100, 80)])
    assert [c.name for c in copies if c.name != "v"] == (["it"] if found else [])


def test_copies_by_size():
    text = f"{COPIES}  ROOT %it = f32[400,80] broadcast(%f)\n}}\n"
    assert [c.bytes for c in large_copies(text, min_bytes=32001)] == [128000]
    assert large_copies(text, min_bytes=128001) == []


@pytest.mark.parametrize(
    ("line", "vmem"),
    [
        ("(f32[100,80]{1,0:S(1)}, f32[100,80]{1,0}, u32[]) copy-start(%f)", True),
        ("(f32[100,80]{1,0}, f32[100,80]{1,0:S(1)}, u32[]) copy-start(%f)", True),
        ("f32[100,80]{1,0:S(1)} custom-call(%f)", True),
        ("(f32[100,80]{1,0}, f32[100,80]{1,0}, u32[]) copy-start(%f)", False),
        ("f32[100,80]{1,0} copy(%f)", False),
        ("(f32[100,80]{1,0:S(5)}, f32[100,80]{1,0}, u32[]) copy-start(%f)", False),  # to the host
    ],
)
def test_a_visit_to_vmem_is_told_from_a_copy(line, vmem):
    (copy,) = large_copies(f"{COPIES}  ROOT %it = {line}\n}}\n", [(100, 80)])
    assert copy.vmem == vmem


def test_an_instruction_on_several_lines():
    """As XLA writes what carries a kernel's metadata; its braces close nothing."""
    text = COPIES + (
        "  %k = f32[100,80] custom-call(%f), frontend_attributes={kernel_metadata={\n"
        '"xprof_metadata":"{\\"block_q\\": 512}"\n'
        '}}, metadata={op_name="jit(f)/kernel"}\n'
        "  ROOT %it = f32[100,80] copy(%k)\n"
        '}, execution_thread="main"\n'
    )
    entry = parse_hlo(text).entry
    assert entry.root.name == "it"
    assert entry.instructions["k"].op_name == "jit(f)/kernel"
    assert [c.name for c in large_copies(text, [(100, 80)])] == ["k", "it"]
