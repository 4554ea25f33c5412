"""Which arrays patterns choose, by hand and by the definition in plain Python."""

from __future__ import annotations

import pytest

from engram_jax.config.errors import UserError
from engram_jax.config.path_patterns import chosen, nearest

NAMES = [
    "embedding",
    "engrams/1/bias",
    "engrams/1/conv/taps",
    "engrams/14/projection",
    "blocks/0/blocks/attention/q_proj",
    "blocks/0/blocks/attention_norm/gain",
    "blocks/1/blocks/attention/q_proj",
    "norm/gain",
    "memory/1",
    "memory/14",
]
ENGRAMS = {"engrams/1/bias", "engrams/1/conv/taps", "engrams/14/projection"}
QUERIES = {"blocks/0/blocks/attention/q_proj", "blocks/1/blocks/attention/q_proj"}
GAINS = {"blocks/0/blocks/attention_norm/gain", "norm/gain"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set(NAMES)),
        (("*",), set(NAMES)),
        (("embedding",), {"embedding"}),
        (("engrams",), ENGRAMS),
        (("engrams/",), ENGRAMS),
        (("engrams/1",), {"engrams/1/bias", "engrams/1/conv/taps"}),
        (("memory/1",), {"memory/1"}),
        (("memory",), {"memory/1", "memory/14"}),
        (("*/q_proj",), QUERIES),
        (("*/attention",), QUERIES),
        (("*/attention*",), QUERIES | {"blocks/0/blocks/attention_norm/gain"}),
        (("!*/gain",), set(NAMES) - GAINS),
        (("!*/gain", "norm"), set(NAMES) - {"blocks/0/blocks/attention_norm/gain"}),
        (("blocks", "!*/gain"), QUERIES),
        (("engrams", "!engrams/1", "engrams/1/bias"), ENGRAMS - {"engrams/1/conv/taps"}),
        (("engrams", "memory"), ENGRAMS | {"memory/1", "memory/14"}),
    ],
)
def test_chosen(patterns, expected):
    assert chosen(patterns, NAMES, "train.trainable") == expected


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (("engram",), "'engram' matches no parameter and no table .* nearest is 'engrams'"),
        (("*/q_prj",), r"nearest is '\*/q_proj'"),
        (("q_proj",), r"nearest is '\*/q_proj'"),
        (("memory/2",), "nearest is 'memory/1'"),
        (("engrams", "!engrams/1/bais"), "'!engrams/1/bais' .* nearest is '!engrams/1/bias'"),
        (("Embedding",), "nearest is 'embedding'"),
        (("engrams/[14]",), "matches no parameter"),
        (("engrams", "!engrams"), "chooses nothing; must leave something"),
        (("!*",), "chooses nothing"),
    ],
)
def test_refused(patterns, told):
    with pytest.raises(UserError, match=f"config.train.trainable.*{told}") as error:
        chosen(patterns, NAMES, "train.trainable")
    assert "\n" not in str(error.value)


def test_the_nearest_matches():
    for pattern in ("zzz", "!block/0", "gains", "attention"):
        found = nearest(pattern, NAMES)
        assert chosen([found.removeprefix("!")], NAMES, "train.trainable")
        assert found.startswith("!") == pattern.startswith("!")
