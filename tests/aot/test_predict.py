"""Predicted times of programs small enough to work them out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.aot.compiling import compile_with_text
from engram_jax.aot.predict import predict
from engram_jax.aot.prices import Links
from engram_jax.aot.topology import parse_topology
from engram_jax.config import MeshConfig
from engram_jax.sharding.rules import make_mesh

N = 4096
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
SQUARE = 2 * N * N  # bytes of it
PRODUCT = 2 * N**3 / 459e12  # seconds of one product at v5p's peak


def product(a, b):
    return a @ b


def doubled(a):
    return a * 2 + 1


def products(a, b, rounds):
    return jax.lax.fori_loop(0, rounds, lambda _, x: x @ b, a)


def ten_products(a, b):
    return products(a, b, 10)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("v5e:2x2", 197e12), ("v5p:2x2x1", 459e12), ("v6e:2x2", 918e12), ("tpu7x:2x2x1", 1153.5e12)],
)
def test_a_product_takes_little_more_than_its_arithmetic(compiled, name, peak):
    """The compiler's cycles at the generation's own clock; at another's it would be outside."""
    found = predict(compiled(name, product, MATRIX, MATRIX), name)
    assert 1.0 < found["matmul_s"] / (2 * N**3 / peak) < 1.25
    assert found["sum_s"] == found["sum_upper_s"] == found["matmul_s"]
    assert found["by_phase_upper_s"] == {"matmul rest": found["matmul_s"]}


def test_a_loop_is_counted_as_often_as_it_runs(compiled):
    name = "v5p:2x2x1"
    one = predict(compiled(name, product, MATRIX, MATRIX), name)["matmul_s"]
    ten = predict(compiled(name, ten_products, MATRIX, MATRIX), name)["matmul_s"]
    assert ten == pytest.approx(10 * one, rel=0.05)
    assert 10 * PRODUCT < ten < 12.5 * PRODUCT


def test_a_loop_whose_length_is_data_is_counted_as_often_as_told(compiled):
    name, rounds = "v5p:2x2x1", jax.ShapeDtypeStruct((), jnp.int32)
    text = compiled(name, products, MATRIX, MATRIX, rounds)
    once, thrice = (predict(text, name, unknown=n)["matmul_s"] for n in (1, 3))
    assert PRODUCT < once < 1.25 * PRODUCT
    assert thrice == pytest.approx(3 * once)


def test_loops_that_communicate_are_told_apart(tpu_slice):
    """Of two loops whose length is data: rounds of an exchange, and chunks of products."""
    name, n = "v5p:2x2x1", 256

    def rounds(x, length):
        def swap(_, x):
            return jax.lax.all_to_all(x, "x", 0, 0, tiled=True)

        there = jax.lax.fori_loop(0, length, swap, x)
        return jax.lax.fori_loop(0, length, lambda _, y: y @ x, there)

    mesh = tpu_slice(name)[1]
    mapped = jax.shard_map(
        rounds, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct((4 * n, n), jnp.bfloat16, sharding=NamedSharding(mesh, P("x"))),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
    ]
    text = compile_with_text(jax.jit(mapped).lower(*arguments), stage="after_codegen")[1]
    same, none, one = (predict(text, name, unknown=3, overflow=k) for k in (None, 0, 1))
    received = n * n * 2 * 3 / 4 / 1e9
    found = [f["collectives_total_GB"] for f in (same, none, one)]
    assert found == pytest.approx([3 * received, 0, received])
    assert none["matmul_s"] == same["matmul_s"] > 0
    assert none["matmul_s"] == pytest.approx(3 * predict(text, name, unknown=1)["matmul_s"])


@pytest.mark.parametrize(
    ("name", "bandwidth"), [("v5e:2x2", 819e9), ("v5p:2x2x1", 2765e9), ("v6e:2x2", 1640e9)]
)
def test_an_elementwise_operation_takes_at_least_its_bytes(compiled, name, bandwidth):
    found = predict(compiled(name, doubled, MATRIX), name, tokens=1000)
    assert found["elementwise_lower_s"] == pytest.approx(2 * SQUARE / bandwidth)
    assert found["elementwise_upper_s"] > found["elementwise_lower_s"]
    assert found["sum_s"] == found["elementwise_lower_s"]
    assert found["us_per_token"] == pytest.approx(
        [found["sum_s"] * 1e3, found["sum_upper_s"] * 1e3]
    )


@pytest.mark.parametrize(
    ("name", "devices", "bandwidth"),
    [
        ("v5p:4x4x8", 128, 3 * 1.8e11),
        ("v5p:2x2x4", 16, 3 * 0.9e11),  # no cube: no wraparound links
        ("v6e:16x16", 256, 2 * 1.8e11),
        ("v5e:4x4", 16, 2 * 4.5e10),
    ],
)
def test_an_all_gather_takes_its_bytes_over_the_links(tpu_slice, name, devices, bandwidth):
    mesh = make_mesh(MeshConfig(), tpu_slice(name)[0].devices)
    shards, whole = (NamedSharding(mesh, spec) for spec in (P("fsdp"), P()))
    gather = jax.jit(lambda x: 2 * x, in_shardings=shards, out_shardings=whole)
    text = compile_with_text(gather.lower(MATRIX), stage="after_codegen")[1]
    found = predict(text, name)
    received = SQUARE * (devices - 1) / devices
    assert found["collectives_GB"] == {f"all-gather/{devices}": pytest.approx(received / 1e9)}
    assert found["collectives_s"] == pytest.approx(received / bandwidth)


@pytest.mark.parametrize(
    ("name", "devices", "bandwidth"),
    [
        *(("v5p:4x4x8", n, 1.8e11) for n in (2, 4, 8)),
        *(("v5p:4x4x8", n, 2 * 1.8e11) for n in (16, 32)),
        *(("v5p:4x4x8", n, 3 * 1.8e11) for n in (64, 128)),
        ("v5p:2x2x4", 4, 0.9e11),
        ("v5p:2x2x4", 8, 2 * 0.9e11),
        ("v6e:16x16", 16, 1.8e11),
        ("v6e:16x16", 32, 2 * 1.8e11),
        ("v6e:8x16", 128, 1.5 * 1.8e11),  # a ring of 16, a line of 8
        ("tpu7x:4x4x4", 8, 0.9e11),  # 4 chips in a ring, whose links two devices share
        ("tpu7x:4x4x4", 128, 3 * 0.9e11),
    ],
)
def test_links_of_a_group(name, devices, bandwidth):
    assert Links(*parse_topology(name)).bandwidth(devices) == pytest.approx(bandwidth)


def module(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


def kernel(name: str, result: str, *operands: str, more: str = "") -> str:
    """A module of one custom call."""
    shapes = ", ".join(operands)
    return module(
        f"ROOT %{name} = {result} custom-call(), custom_call_target="
        f'"tpu_custom_call", operand_layout_constraints={{{shapes}}}{more}'
    )


def only_kernel(text: str, **options: float) -> float:
    found = predict(text, "v5p:4x4x8", **options)
    (seconds,) = found["kernels"].values()
    assert found["sum_s"] == found["kernels_s"] == seconds
    return seconds


def test_a_kernel_takes_its_bytes_or_the_flops_it_declares():
    arrays = "bf16[1024,1024]{1,0}", "bf16[1024,1024]{1,0}"
    by_bytes = 2 * 1024 * 1024 * 2 / 2765e9
    assert only_kernel(kernel("k.1", *arrays)) == pytest.approx(by_bytes)
    declared = ', backend_config={"custom_call_config":{"cost_estimate":{%s}}}'
    told = declared % '"flops":"459000000000"'
    assert only_kernel(kernel("k.1", *arrays, more=told)) == pytest.approx(1e-3)
    # It reads one operand several times, or a few rows of it.
    told = declared % '"bytes_accessed":"27650000","flops":"1000"'
    assert only_kernel(kernel("k.1", *arrays, more=told)) == pytest.approx(1e-5)


def test_a_grouped_product_by_its_shapes():
    rows, out, matrices = (
        "bf16[65536,2560]{1,0}",
        "bf16[65536,1536]{1,0}",
        "bf16[7,2560,1536]{2,1,0}",
    )
    text = kernel("ragged-dot-none.3", out, rows, matrices)
    flops = 2 * 65536 * 2560 * 1536
    assert only_kernel(text) == pytest.approx(flops / 459e12)
    assert only_kernel(text, pairs=32768) == pytest.approx(flops / 2 / 459e12)
    assert only_kernel(text, pairs=10**6) == only_kernel(text)
    few = 2 * (256 * (2560 + 1536) + 7 * 2560 * 1536) / 2765e9  # now the matrices take longest
    assert only_kernel(text, pairs=256) == pytest.approx(few)


@pytest.mark.parametrize(
    ("name", "width"), [("fwd", 192 + 128), ("dq", 2 * 192 + 128), ("dkv", 3 * 192 + 2 * 128)]
)
def test_attention_leaves_out_what_the_causal_mask_does(name, width):
    queries = "bf16[5,32,4096,192]{3,2,1,0}"
    flops = 2 * 5 * 32 * 4096**2 * (36 / 64) * width  # of 8 x 8 blocks; dkv alone makes dq, too
    text = kernel(f"splash_mha_{name}_segmented.2", "bf16[5,32,4096,128]{3,2,1,0}", queries)
    assert only_kernel(text) == pytest.approx(flops / 459e12)


def test_attention_of_a_cut_sequence_is_its_share():
    """A quarter of the queries of 16,384 tokens, and all keys: 32 x 33 / 2 blocks of 4 devices."""
    queries, keys = (f"bf16[2,32,{length},192]{{3,2,1,0}}" for length in (4096, 16384))
    text = kernel("splash_mha_fwd_segmented.2", "bf16[2,32,4096,128]{3,2,1,0}", queries, keys)
    flops = 2 * 2 * 32 * (32 * 33 / 2 / 4) * 512**2 * (192 + 128)
    assert only_kernel(text) == pytest.approx(flops / 459e12)


def test_what_the_compiler_has_no_estimate_for():
    text = module(
        "%table = f32[1000000,128]{1,0:T(8,128)} parameter(0)",
        "%rows = f32[8192,128]{1,0:T(8,128)} parameter(1)",
        "%scatter.1 = f32[1000000,128]{1,0:T(8,128)} fusion(%table, %rows), kind=kCustom",
        "%copy.1 = f32[8192,128]{1,0:T(8,128)} copy(%rows)",
        "%small = f32[8,128]{1,0:T(8,128)} parameter(2)",
        "%copy.2 = f32[8,128]{1,0:T(8,128)} copy(%small)",
        "ROOT %gather.1 = f32[8192,128]{1,0:T(8,128)} fusion(%rows), kind=kCustom, backend_config="
        '{"window_config":{"estimated_cycles":"9223372036854775807"}}',
    )
    rows = 8192 * 128 * 4
    expected = {"scatter": 3 * rows, "copy": 2 * rows, "SparseCore": 2 * rows}
    found = predict(text, "v5p:4x4x8")
    assert found["unpriced"] == pytest.approx({k: v / 2765e9 for k, v in expected.items()})
    assert found["sum_s"] == pytest.approx(sum(expected.values()) / 2765e9)
