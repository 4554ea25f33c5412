"""Which keys two configurations differ in."""

from __future__ import annotations

import copy
import json
import math

import pytest

from engram_jax.config import Config, to_dict
from engram_jax.config.difference import ABSENT, differences


def test_a_configuration_and_what_a_file_keeps_of_it_are_equal():
    assert differences(Config(), json.loads(json.dumps(to_dict(Config())))) == []


def test_every_key_is_compared():
    """Each value of the configuration, changed alone, is the one difference that is found."""
    found = []

    def visit(section: dict, path: str, whole: dict) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                visit(value, f"{path}{key}.", whole)
            else:
                section[key] = "changed"
                assert differences(Config(), whole) == [(f"{path}{key}", value, "changed")]
                section[key] = value
                found.append(f"{path}{key}")

    whole = copy.deepcopy(to_dict(Config()))
    visit(whole, "", whole)
    assert {"name", "optimizer.peak_lr", "model.engram.layers", "serve.port"} < set(found)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, [("a.c", 2, 3)]),
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        ({"a": (1, 2)}, {"a": (1, 2, 3)}, [("a", (1, 2), (1, 2, 3))]),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": "1"}, {"a": 1}, [("a", "1", 1)]),
        ({"a": math.nan}, {"a": math.nan}, []),
        ({"b": 1, "a": 1}, {"c": 1, "a": 1}, [("b", 1, ABSENT), ("c", ABSENT, 1)]),
        ({"a": 1}, {"a": {"b": 2}}, [("a", 1, ABSENT), ("a.b", ABSENT, 2)]),
        ({"a": None}, {}, [("a", None, ABSENT)]),
    ],
)
def test_values(ours, theirs, expected):
    assert differences(ours, theirs) == expected
    assert sorted(differences(theirs, ours)) == sorted((k, b, a) for k, a, b in expected)
    assert f"{ABSENT}" == "absent"
