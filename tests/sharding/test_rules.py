"""Mesh shapes and what they cut: refused with the numbers where they do not divide."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from engram_jax.config import MeshConfig
from engram_jax.config.errors import UserError
from engram_jax.sharding import rules
from engram_jax.sharding.rules import Axes
from engram_jax.training.state import abstract_state, build_training
from tests.runs import configuration
from tests.tiny import tiny_addressing, tiny_config


class Leaf:
    def __init__(self, *shape):
        self.shape = shape


def test_fsdp_takes_the_devices_that_are_left():
    assert rules.axes_for(MeshConfig(), 8) == Axes(fsdp=8)
    assert rules.axes_for(MeshConfig(data=2, expert=2), 8) == Axes(data=2, fsdp=2, expert=2)
    assert rules.axes_for(MeshConfig(sequence=4), 8) == Axes(fsdp=2, sequence=4)
    assert rules.axes_for(MeshConfig(), 1) == Axes()


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        (MeshConfig(expert=3), 8),
        (MeshConfig(expert=16), 8),
        (MeshConfig(fsdp=4), 8),
        (MeshConfig(fsdp=8, tensor=2), 8),
        (MeshConfig(sequence=3), 8),
    ],
)
def test_axes_that_do_not_multiply_up(mesh, devices):
    with pytest.raises(UserError, match="must make 8, the number of devices") as refused:
        rules.axes_for(mesh, devices)
    assert f"expert {mesh.expert}" in str(refused.value)


def test_between_slices_only_the_data_axis():
    class Device:
        platform, device_kind = "tpu", "TPU v5p"

        def __init__(self, number):
            self.slice_index = number % 2

    with pytest.raises(UserError, match=r"mesh.data = 1: must be a multiple of 2, the number of"):
        rules.make_mesh(MeshConfig(), [Device(number) for number in range(8)])


@pytest.mark.parametrize(
    ("axes", "overrides", "says"),
    [
        (Axes(fsdp=3), {}, "config.data.batch_size = 4: must be a multiple of 3"),
        (Axes(fsdp=4), {"train.accumulation": 2}, "multiple of 8 = data x fsdp x expert x train"),
        (Axes(fsdp=4), {"model.d_model": 18}, "config.model.d_model = 18: must be a multiple of 4"),
        (Axes(fsdp=4), {"model.attention.kv_lora_rank": 6}, "kv_lora_rank = 6"),
        (Axes(tensor=4), {}, "config.model.attention.heads = 2: must be a multiple of 4 = tensor"),
        (Axes(tensor=2), {"data.seq_len": 21}, "config.data.seq_len = 21"),
        (Axes(sequence=2), {"data.seq_len": 22}, "= 22: must be a multiple of 4 = 2 x sequence"),
        (Axes(sequence=2, tensor=2), {"data.seq_len": 36}, "multiple of 8 = 2 x sequence x tensor"),
        (Axes(sequence=2), {"data.seq_len": 32}, "= 32: must be at least 36 on the mesh"),
        (Axes(tensor=2), {"model.ffn.dense_dim": 25}, "config.model.ffn.dense_dim = 25"),
        (Axes(expert=2), {"model.ffn.expert_dim": 11}, "the experts do not divide"),
        (Axes(fsdp=2), {"optimizer.memory_optimizer": "dense_adam"}, "one device; this mesh has 2"),
    ],
)
def test_what_an_axis_does_not_divide(axes, overrides, says):
    with pytest.raises(UserError) as refused:
        rules.check(tiny_config(**overrides), axes)
    assert says in str(refused.value)


def test_what_divides_is_accepted():
    rules.check(tiny_config(), Axes(fsdp=2, expert=2, tensor=2))
    rules.check(tiny_config(), Axes())
    rules.check(tiny_config(**{"data.seq_len": 36}), Axes(sequence=2))
    rules.check(tiny_config(**{"model.engram.conv_kernel": 0}), Axes(sequence=2))


@pytest.mark.parametrize("name", ["engram27b", "engram40b"])
@pytest.mark.parametrize("axes", [Axes(fsdp=128), Axes(fsdp=16, expert=8), Axes(fsdp=32, expert=8)])
def test_the_paper_s_models_divide_over_a_slice(name, axes):
    config = configuration(name)
    train = dataclasses.replace(config.train, accumulation=1280 // axes.devices)
    rules.check(dataclasses.replace(config, train=train), axes)


@pytest.mark.parametrize(
    ("path", "shape", "axes", "expected"),
    [
        # Expert stacks [layers, E, in, out]: whole experts where E divides, else pieces of each.
        ("gate", (2, 8, 16, 12), Axes(fsdp=2, expert=4), P(None, ("expert",), ("fsdp",), "tensor")),
        ("down", (2, 8, 12, 16), Axes(fsdp=2, expert=4), P(None, ("expert",), "tensor", ("fsdp",))),
        (
            "gate",
            (2, 5, 16, 12),
            Axes(fsdp=2, expert=4),
            P(None, None, ("fsdp",), ("expert", "tensor")),
        ),
        ("gate", (2, 16, 12), Axes(fsdp=2), P(None, ("fsdp",), "tensor")),
        ("embedding", (61, 16), Axes(fsdp=2), P(None, ("fsdp",))),
        ("q_proj", (2, 16, 24), Axes(), P(None, ("fsdp",), "tensor")),
        ("scale", (2, 16), Axes(fsdp=8), P()),
    ],
)
def test_where_parameters_lie(path, shape, axes, expected):
    found = rules.spec((path,), Leaf(*shape), axes)

    def plain(spec):
        return [(p,) if isinstance(p, str) else p for p in spec]

    assert plain(found) == plain(expected)


# Gains, biases, taps and the few numbers of a hyper-connection: repeated on every device.
REPEATED = {"base", "bias", "gain", "norm_gain", "scale", "taps"}


def test_every_matrix_of_a_model_is_cut():
    config = tiny_config()
    program = build_training(config, tiny_addressing(config))
    whole = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(program).params):
        if rules.spec(path, leaf, Axes(fsdp=2)) == P():
            whole.add(rules.names(path)[-1])
    assert whole == REPEATED
