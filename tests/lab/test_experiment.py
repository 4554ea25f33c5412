"""Experiments: the names of their points, and what every declared one is made of."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re

import pytest

from engram_jax.config import parse_config
from engram_jax.config.difference import differences
from engram_jax.config.errors import UserError
from engram_jax.lab.experiment import Experiment, Point
from engram_jax.lab.results import table_size
from tests.model.test_budgets import counted, off
from tests.runs import ROOT, launched, refused

FOLDER = ROOT / "configs" / "experiments"
ONE_RATE = ("depth", "short_context", "long_context")
NAMES = ("allocation", "allocation_large", "slots", "components", *ONE_RATE)


def declared(name: str) -> Experiment:
    return importlib.import_module(f"configs.experiments.{name}").EXPERIMENT


def configs(name: str) -> dict:
    """Every point's configuration with the first seed, by name."""
    experiment = declared(name)
    return {p.name: parse_config(experiment.config(p.name)) for p in experiment.points}


@pytest.fixture(scope="module")
def allocation() -> Experiment:
    return declared("allocation")


def test_every_experiment_is_listed():
    assert {p.stem for p in FOLDER.glob("*.py")} == {*NAMES, "__init__", "paper_budgets"}


@pytest.mark.parametrize("name", NAMES)
def test_every_point_is_a_configuration_that_says_what_it_is(name):
    experiment, found = declared(name), configs(name)
    assert experiment.name == name
    assert len({config.name for config in found.values()}) == len(found) == len(experiment.points)
    for config in found.values():
        assert config.train.count_models is False and config.train.samples == ()
        assert config.data.near_duplicates > 0
        tokens = config.train.steps * config.data.batch_size * config.data.seq_len
        assert tokens >= (3_000_000 if name == "allocation_large" else 800_000)
    for point in experiment.points:
        assert len(experiment.rates[point.family]) == (1 if name in ONE_RATE else 3)
        assert experiment.point(experiment.tune[point.family]).family == point.family


@pytest.mark.parametrize("name", NAMES)
def test_seeds_differ_in_nothing_else(name):
    """Batches and initial values come of these two seeds, so differences are paired."""
    experiment = declared(name)
    assert len(experiment.seeds) >= 3
    point = experiment.points[-1].name
    first, second = (parse_config(experiment.config(f"{point},seed={s}")) for s in (0, 1))
    changed = {key: values for key, *values in differences(first, second)}
    source = changed.pop("train.init_from", None)
    assert (source is not None) == (name == "long_context")
    assert changed.keys() == {"name", "train.seed", "data.seed"}
    assert changed["train.seed"] == changed["data.seed"] == [0, 1]


@pytest.mark.parametrize("name", ["allocation", "allocation_large"])
def test_allocation_keeps_the_budget(name):
    """Counted by the equations of tests/model/test_describe.py."""
    experiment, found = declared(name), configs(name)
    base = parse_config(experiment.base())
    assert len(found) >= 5 and found["rho=1"].model == base.model
    for point, config in found.items():
        mismatch = off(config, base)
        assert abs(mismatch["total"]) < 1e-3 and abs(mismatch["active"]) < 1e-3
        assert abs(mismatch["flops"]) < 5e-3
        assert counted(config)["rho"] == pytest.approx(float(point[4:]), abs=0.5 / 19 + 2e-3)


def test_the_larger_allocation_costs_four_times_as_much():
    small, large = (parse_config(declared(n).base()) for n in ("allocation", "allocation_large"))
    assert counted(large)["flops"] >= 4 * counted(small)["flops"]


def test_slots_change_the_rows_alone():
    found = configs("slots")
    sizes = [config for name, config in found.items() if name.startswith("engram=")]
    assert len(sizes) >= 6
    rows = [table_size(config)[0] for config in sizes]
    growth = [after / before for before, after in itertools.pairwise(rows)]
    assert all(2.9 < factor < 4.1 for factor in growth)  # geometric, but for the gaps of primes
    for before, after in itertools.pairwise(sizes):
        changed = {key for key, *_ in differences(before, after)}
        assert changed == {"name", "model.engram.rows_per_head"}


def test_components_are_at_one_budget():
    from configs.experiments import components

    found, base = configs("components"), parse_config(declared("components").base())
    reference = found["variant=engram"]
    for name, (_, rule, keys) in components.VARIANTS.items():
        config = found[f"variant={name}"]
        mismatch, changed = off(config, base), {k for k, *_ in differences(config, reference)}
        if rule in ("matched", "active"):
            assert abs(mismatch["active"]) < 1e-3, name
        if rule in ("matched", "total"):
            assert abs(mismatch["total"]) < 1e-3, name
        size, _ = components.SIZES.get(name, ("model.engram.rows_per_head", 1))
        solved = {"model.ffn.dense_dim", size}
        assert changed <= {*keys, "name", *(solved if rule != "same" else ())}
        assert changed >= set(keys)


def test_a_point_is_named_as_on_the_command_line(allocation):
    launch = allocation.parse("rho=0.8,seed=2,rate=0.008")
    assert (launch.point.value, launch.seed, launch.rate) == (0.8, 2, 8e-3)
    assert launch.name == "rho=0.8,seed=2,rate=0.008"
    assert allocation.parse(launch.name) == launch
    config = parse_config(allocation.config(launch.name))
    assert (config.train.seed, config.data.seed, config.optimizer.peak_lr) == (2, 2, 8e-3)
    assert config.name == "allocation-rho-0.8-seed-2-rate-0.008"
    alone = allocation.parse("")  # the baseline, the first seed, the middle rate
    assert alone.name == "rho=1,seed=0,rate=0.008"
    undeclared = parse_config(allocation.config("rho=0.75,seed=1"))
    assert undeclared.model.ffn.routed_experts == 17


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("rho", "must be KEY=VALUE"),
        ("rho=0.8,rho=0.7", "each key once"),
        ("rho=0.8,width=3", "must have one of rho"),
        ("rho=much", "rho=much: must be a number"),
        ("rho=0.8,seed=x", "seed=x: must be a whole number"),
        ("rho=0.8,rate=-1", "rate=-1: must be a number"),
        ("width=3", "no point width=3; it has rho=1, rho=0.9"),
        ("rho=0.99", "must be from 0.000 to 0.947"),
    ],
)
def test_wrong_points_are_refused(argument, words):
    file = FOLDER / "allocation.py"
    refused(launched(f"--config={file}:{argument}", "--mode=describe"), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none=5", "none=5: the one point without tables is none=0"),
        ("engram=1.5", "engram=1.5: must be a whole number of rows per head >= 1"),
        ("engram=0", "engram=0: must be a whole number of rows per head >= 1"),
        ("over_encoding=0.5", "over_encoding=0.5: must be a whole number"),
    ],
)
def test_slots_that_are_no_tables_are_refused(name, words):
    with pytest.raises(UserError, match=re.escape(words)):
        declared("slots").point(name)
    assert declared("slots").point("engram=100").value == 100


def test_a_declaration_that_does_not_fit_together_is_refused():
    one = Point("a", 1, "x", "f")

    def declare(points=(one,), baseline="a=1", tune="a=1", rates=(1e-3,)):
        return Experiment(
            name="e", title="", base=dict, build=dict, points=points, baseline=baseline,
            seeds=(0,), rates={"f": rates}, tune={"f": tune}, axis="",
        )  # fmt: skip

    declare()
    with pytest.raises(UserError, match="two points have one name"):
        declare(points=(one, Point("a", 1.0, "y", "f")))
    with pytest.raises(UserError, match="a=2 is not one of its points"):
        declare(baseline="a=2")
    with pytest.raises(UserError, match="a=3 is not one of its points"):
        declare(tune="a=3")
    with pytest.raises(UserError, match="family f has no rates"):
        declare(rates=())


def test_a_long_model_begins_with_the_short_one_of_its_variant_and_seed():
    short, long = declared("short_context"), declared("long_context")
    assert short.points == long.points and short.seeds == long.seeds == (0, 1, 2)
    for point, seed in itertools.product(("moe", "engram"), short.seeds):
        first = parse_config(short.config(f"variant={point},seed={seed}"))
        second = parse_config(long.config(f"variant={point},seed={seed}"))
        source = f"runs/short_context/variant={point},seed={seed},rate=0.008"
        assert second.train.init_from == source
        assert not first.train.init_from
        yarn = second.model.attention.yarn
        assert (yarn.scale, yarn.original_length) == (8, first.data.seq_len)
        assert second.data.seq_len == 2048
        attention = dataclasses.replace(second.model.attention, yarn=first.model.attention.yarn)
        assert dataclasses.replace(second.model, attention=attention) == first.model
        assert second.tokenizer == first.tokenizer
