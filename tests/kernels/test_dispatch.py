"""Which implementation runs, and what the user is told."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import dispatch, tuning
from kernels_pallas.dispatch import AUTO, PALLAS, REFERENCE, TPU, Choice, UnsupportedError
from kernels_pallas.engram_gate.api import engram_gate

FOLDER = Path(kernels_pallas.__file__).parent


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: ("tpu", "TPU v5"))
    monkeypatch.setattr(dispatch, "_told", set())


def test_a_cpu_takes_the_reference_and_interprets_the_kernel_when_told():
    assert dispatch.choose("op", AUTO, {TPU: None}) == Choice(None)
    assert dispatch.choose("op", REFERENCE, {TPU: None}) == Choice(None)
    assert dispatch.choose("op", PALLAS, {TPU: None}) == Choice(TPU, interpret=True)


def test_a_tpu_takes_the_kernel_or_says_once_why_not(on_tpu, caplog):
    with caplog.at_level(logging.WARNING):
        assert dispatch.choose("op", AUTO, {TPU: None}) == Choice(TPU)
        assert not caplog.records
        for _ in range(3):
            assert dispatch.choose("op", AUTO, {TPU: "d = 100 is odd"}) == Choice(None)
        assert dispatch.choose("op", AUTO, {TPU: "another"}) == Choice(None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "op: the reference runs on TPU v5, not the kernel: d = 100 is odd",
        "op: the reference runs on TPU v5, not the kernel: another",
    ]


def test_several_devices_outside_shard_map_take_the_reference(on_tpu, monkeypatch, caplog):
    """XLA cannot partition a kernel; inside shard_map, and for one device, it need not."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert dispatch.choose("op", AUTO, {TPU: None}) == Choice(None)
    assert "not inside shard_map" in caplog.records[-1].getMessage()
    assert dispatch.choose("op", PALLAS, {TPU: None}) == Choice(TPU)
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    seen = []

    def inside(x):
        seen.append(dispatch.choose("op", AUTO, {TPU: None}))
        return x

    spec = jax.sharding.PartitionSpec("x")
    jax.make_jaxpr(jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.zeros(1))
    assert seen == [Choice(TPU)]


def test_a_gpu_takes_the_reference_until_somebody_has_measured(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "device", lambda: ("gpu", "NVIDIA H200"))
    monkeypatch.setattr(dispatch, "_told", set())
    t, c, m, d = 4, 128, 2, 128
    ones = [jnp.ones(s) for s in ((t, c), (c, m + 1, d), (t, m, d), (m, d))]
    ours, _ = engram_gate(*ones, eps=1e-6)
    assert "has not been measured on a GPU" in caplog.records[-1].getMessage()
    theirs, _ = engram_gate(*ones, eps=1e-6, implementation="reference")
    assert (ours == theirs).all()


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize(
    ("which", "shape", "says"),
    [
        (0, (5, 128), r"rows \(5, 128\) for streams \(4, 2, 128\): not \(4, 128\)"),
        (1, (256, 3, 128), r"weights \(256, 3, 128\) .* not \(128, 3, 128\)"),
        (1, (128, 4, 128), r"weights \(128, 4, 128\) .* not \(128, 3, 128\)"),
        (3, (3, 128), r"gain \(3, 128\) .* not \(2, 128\)"),
        (4, (2, 128), r"bias \(2, 128\) .* not \(3, 128\)"),
        (5, (3,), r"mask \(3,\) .* not \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit(which, shape, says, implementation):
    shapes = [(4, 128), (128, 3, 128), (4, 2, 128), (2, 128), (3, 128), (4,)]
    shapes[which] = shape
    args = [jnp.ones(s, bool if k == 5 else "float32") for k, s in enumerate(shapes)]
    with pytest.raises(ValueError, match=says):
        engram_gate(*args, eps=1e-6, implementation=implementation)


def test_no_kernel_for_a_platform(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: ("gpu", "NVIDIA"))
    with pytest.raises(UnsupportedError, match="op: there is no kernel for gpu"):
        dispatch.choose("op", PALLAS, {TPU: None})


def test_bad_names():
    with pytest.raises(ValueError, match=r"op: implementation 'cuda' is not one of \('auto'"):
        dispatch.choose("op", "cuda", {})


@pytest.mark.parametrize(
    ("shapes", "dtype", "recipe", "says"),
    [
        ((4, 100, 2, 128), "float32", None, "d_mem = 100 and d = 128 must be multiples of 128"),
        ((4, 128, 2, 64), "float32", None, "d_mem = 128 and d = 64 must be multiples of 128"),
        ((4, 128, 33, 128), "float32", None, "33 streams are more than 32"),
        ((0, 128, 2, 128), "float32", None, "there are no tokens"),
        ((4, 128, 2, 128), "float16", None, "float16 is not float32 or bfloat16"),
        ((4, 2**17, 2, 128), "float32", None, "need .* MiB of VMEM, more than 62"),
        ((4, 128, 2, 128), "float32", "fp4", "recipe 'fp4' is not one of"),
    ],
)
def test_what_the_gate_refuses(shapes, dtype, recipe, says):
    t, c, m, d = shapes
    args = (
        jnp.zeros((t, c), dtype),
        jnp.zeros((c, m + 1, d), dtype),
        jnp.zeros((t, m, d), dtype),
        jnp.ones((m, d)),
    )
    with pytest.raises(ValueError, match=says) as error:
        engram_gate(*args, eps=1e-6, recipe=recipe, implementation="pallas")
    assert str(error.value).startswith("engram_gate: ") and "\n" not in str(error.value)
    if recipe is None:  # the reference takes what the kernel does not
        engram_gate(*args, eps=1e-6)


def test_the_device_is_that_of_the_mesh_in_context(tpu_slice):
    assert dispatch.device() == ("cpu", jax.devices()[0].device_kind)
    found = []
    _, mesh = tpu_slice("v6e:2x2")

    def inside(x):
        found.append((dispatch.device(), tuning.vmem_limit()))
        return x

    spec = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.make_jaxpr(run)(jnp.zeros(4))
    assert found == [(("tpu", "TPU v6 lite"), 126 << 20)]


def test_tuned_blocks_are_of_the_device(on_tpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    tuning._table.cache_clear()
    (tmp_path / "op").mkdir()
    table = {"blocks": {"TPU v5": {"key": {"tokens": 8}}, "TPU7x": {"other": {"tokens": 16}}}}
    (tmp_path / "op" / "tuned.json").write_text(json.dumps(table))
    assert tuning.tuned("op", "key") == {"tokens": 8}
    assert tuning.tuned("op", "other") is None and tuning.tuned("nothing", "key") is None
    with tuning.trying({("op", "key"): {"tokens": 4}}) as asked:
        assert tuning.tuned("op", "key") == {"tokens": 4}
        assert asked == [("op", "key")]
    assert tuning.tuned("op", "key") == {"tokens": 8}
    tuning._table.cache_clear()


def test_the_gate_is_tuned_for_every_generation():
    tuned = json.loads((FOLDER / "engram_gate" / "tuned.json").read_text())
    assert {"TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"} <= set(tuned["blocks"])
    for keys in tuned["blocks"].values():
        assert {key.split("_")[0] for key in keys} >= {"C1280", "C6144", "backward"}


@pytest.mark.parametrize("op", ["engram_gate", "short_conv", "mhc"])
def test_what_an_op_consists_of(op):
    names = {path.name for path in (FOLDER / op).iterdir()}
    assert names >= {
        *("README.md", "api.py", "reference.py", "tpu.py", "gpu.py", "vjp.py", "shapes.py"),
        *("bench.py", "tuned.json"),
    }
    tuned = json.loads((FOLDER / op / "tuned.json").read_text())
    assert isinstance(tuned["how"], str) and isinstance(tuned["blocks"], dict)
