"""The addressing artifact: what it is built from, what it refuses, saved and loaded again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from engram_jax.addressing import (
    Addressing,
    build_addressing,
    check_same,
    plan_layer,
    tokenizer_fingerprint,
)
from engram_jax.config import Config, EngramConfig, ModelConfig, TokenizerConfig
from engram_jax.config.errors import UserError
from tests.addressing.cases import DEMO


def configuration(tokens: TokenizerConfig, **engram) -> Config:
    fields = {"layers": (1, 3), "rows_per_head": (50,), "d_mem": 64, "heads_per_order": 2, **engram}
    return Config(tokenizer=tokens, model=ModelConfig(engram=EngramConfig(**fields)))


@pytest.fixture
def config() -> Config:
    return configuration(TokenizerConfig(vocab_size=12, pad_id=2, eos_id=8))


@pytest.fixture
def addressing(config, small_tokenizer) -> Addressing:
    return build_addressing(config, small_tokenizer)


def one_line(raised: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- build ---------------------------------------------------------------------------------------


def test_build_from_a_tokenizer(addressing, small_tokenizer):
    np.testing.assert_array_equal(addressing.compression, [0, 1, 0, 2, 3, 3, 1, 4, 5])
    assert addressing.canonical_vocab_size == 6
    assert addressing.pad_id == 0  # raw 2 ("PAD") reads as raw 0 ("pad")
    assert addressing.eos_id == 8
    assert addressing.tokenizer_fingerprint == tokenizer_fingerprint(small_tokenizer)
    assert list(addressing.layers) == [1, 3]
    assert {(layer.fill_id, layer.restart_id) for layer in addressing.layers.values()} == {
        (0, None)
    }


def test_build_without_a_tokenizer_plans_the_same_layers(config, addressing):
    tokens = dataclasses.replace(config.tokenizer, canonical_vocab_size=6, pad_id=0)
    described = build_addressing(dataclasses.replace(config, tokenizer=tokens))
    assert described.layers == addressing.layers
    assert described.compression is None


def test_build_gives_the_golden_demo(golden, published_tokenizer):
    tokens = TokenizerConfig(vocab_size=129_280, canonical_vocab_size=98_627, pad_id=2)
    config = Config(tokenizer=tokens, model=ModelConfig(engram=DEMO))
    expected = golden("addressing_demo")
    for found in (build_addressing(config), build_addressing(config, published_tokenizer("0.2.0"))):
        for layer_id, layer in found.layers.items():
            np.testing.assert_array_equal(layer.multipliers, expected[f"multipliers_{layer_id}"])
            np.testing.assert_array_equal(layer.head_sizes, expected[f"primes_{layer_id}"].ravel())
    with pytest.raises(UserError, match=r"98627.* 99092 "):
        build_addressing(config, published_tokenizer("0.3.0"))


def test_build_qwen_hashes_raw_ids(config, small_tokenizer):
    qwen = configuration(config.tokenizer, hash_dialect="qwen")
    found = build_addressing(qwen, small_tokenizer)
    assert found.compression is None
    assert found.canonical_vocab_size == 12
    assert {(layer.fill_id, layer.restart_id) for layer in found.layers.values()} == {(8, 8)}
    assert build_addressing(qwen).layers == found.layers


@pytest.mark.parametrize(
    ("changes", "with_tokenizer", "told"),
    [
        ({}, False, r"canonical_vocab_size = 0: must be the number"),
        ({"canonical_vocab_size": 7}, True, r"canonical_vocab_size = 7 .* 6 canonical ids"),
        ({"vocab_size": 8, "eos_id": 7}, True, r"vocab_size = 8: must be at least .* 9 ids"),
        ({"pad_id": 9}, True, r"pad_id = 9: must be an id of the tokenizer, 0 to 8"),
    ],
)
def test_build_refuses_sizes_that_disagree(config, small_tokenizer, changes, with_tokenizer, told):
    tokens = dataclasses.replace(config.tokenizer, **changes)
    with pytest.raises(UserError, match=r"config\.tokenizer\." + told) as raised:
        build_addressing(
            dataclasses.replace(config, tokenizer=tokens),
            small_tokenizer if with_tokenizer else None,
        )
    one_line(raised)


def test_build_qwen_refuses_a_compressed_size(config):
    tokens = dataclasses.replace(config.tokenizer, canonical_vocab_size=6)
    with pytest.raises(
        UserError, match=r"canonical_vocab_size = 6: must be 0 or .*vocab_size = 12"
    ):
        build_addressing(configuration(tokens, hash_dialect="qwen"))


def test_build_without_compression_hashes_raw_ids(config, small_tokenizer):
    """The paper's dialect with raw ids: its primes, the multipliers of the larger vocabulary."""
    raw = configuration(config.tokenizer, compression=False)
    found = build_addressing(raw, small_tokenizer)
    assert found.compression is None and found.canonical_vocab_size == 12
    assert {(layer.fill_id, layer.restart_id) for layer in found.layers.values()} == {(2, None)}
    assert found.layers == plan_layer(raw.model.engram, 12, fill_id=2)
    compressed = build_addressing(config, small_tokenizer)
    assert found.layers[1].head_sizes == compressed.layers[1].head_sizes
    assert found.layers[1].multipliers != compressed.layers[1].multipliers
    tokens = dataclasses.replace(config.tokenizer, canonical_vocab_size=6)
    raw = configuration(tokens, compression=False)
    with pytest.raises(UserError, match="compression = False reads raw ids"):
        build_addressing(raw, small_tokenizer)


def test_build_keeps_what_the_switches_say(config, small_tokenizer):
    switched = configuration(config.tokenizer, lookup="one_row", signs=True, case=True)
    found = build_addressing(switched, small_tokenizer)
    assert (found.lookup, found.signs) == ("one_row", True)
    np.testing.assert_array_equal(found.case, [1, 2, 3, 1, 1, 3, 6, 1, 1])
    assert {layer.head_sizes for layer in found.layers.values()} == {(1,) * 4}
    tokens = dataclasses.replace(config.tokenizer, canonical_vocab_size=6)
    assert build_addressing(dataclasses.replace(switched, tokenizer=tokens)).case is None


def test_build_without_memory_needs_no_sizes():
    assert build_addressing(Config()).layers == {}


# ---- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_sees_everything_that_decides_an_address(addressing):
    layer = addressing.layers[1]

    def with_layer(**changes) -> Addressing:
        changed = dataclasses.replace(layer, **changes)
        return dataclasses.replace(addressing, layers={**addressing.layers, 1: changed})

    compression = addressing.compression.copy()
    compression[-1] = 0
    others = [
        dataclasses.replace(addressing, compression=compression),
        dataclasses.replace(addressing, compression=None),
        dataclasses.replace(addressing, tokenizer_fingerprint="0"),
        dataclasses.replace(addressing, dialect="qwen"),
        dataclasses.replace(addressing, pad_id=1),
        dataclasses.replace(addressing, layers={1: layer}),
        with_layer(multipliers=(layer.multipliers[0] + 2, *layer.multipliers[1:])),
        with_layer(head_sizes=layer.head_sizes[::-1]),
        with_layer(fill_id=1),
        with_layer(restart_id=1),
        with_layer(row_multiple=128),
        dataclasses.replace(addressing, lookup="shuffled"),
        dataclasses.replace(addressing, signs=True),
        dataclasses.replace(addressing, case=np.zeros(9, np.int32)),
        dataclasses.replace(addressing, case=np.ones(9, np.int32)),
    ]
    assert len({a.fingerprint for a in [addressing, *others]}) == 1 + len(others)
    for other in others:
        with pytest.raises(UserError) as raised:
            check_same(addressing, other)
        message = one_line(raised)
        assert addressing.fingerprint in message
        assert other.fingerprint in message
        another_tokenizer = other.tokenizer_fingerprint != addressing.tokenizer_fingerprint
        assert ("the text that it is trained on has changed" in message) == another_tokenizer
        assert ("another --workdir" in message) == another_tokenizer
    assert len({other.tokenizer_fingerprint for other in others}) > 1
    with pytest.raises(UserError, match=r" in compression: "):
        check_same(others[0], addressing)
    for at, name in ((-4, "lookup"), (-3, "signs"), (-2, "case")):
        for one, other in ((others[at], addressing), (addressing, others[at])):
            with pytest.raises(UserError, match=rf" in {name}: "):
                check_same(one, other)
    with pytest.raises(UserError, match=r" in case: "):
        check_same(others[-1], others[-2])


def test_equal_addressings_are_the_same(config, small_tokenizer, addressing):
    again = build_addressing(config, small_tokenizer)
    assert again.fingerprint == addressing.fingerprint
    check_same(addressing, again)
    # The paper's dialect reads no end-of-sequence id, so another one changes no address.
    check_same(addressing, dataclasses.replace(again, eos_id=3))


def test_fingerprint_of_the_stored_form_does_not_drift():
    """A different number here means that every stored checkpoint would be refused."""
    config = configuration(TokenizerConfig(canonical_vocab_size=100, pad_id=2))
    compression = np.arange(5, dtype=np.int32)
    found = dataclasses.replace(build_addressing(config), compression=compression).fingerprint
    assert found == "1a21c1c991ad72c54c449d2f441d030b24c4111741a3438560c50bc16f0f9da0"


# ---- save and load -------------------------------------------------------------------------------


def test_save_and_load(addressing, tmp_path):
    case = np.arange(9, dtype=np.int32)
    changes = ({}, {"compression": None}, {"lookup": "shuffled", "case": case}, {"signs": True})
    for number, change in enumerate(changes):
        given = dataclasses.replace(addressing, **change)
        folder = tmp_path / str(number) / "addressing"
        given.save(folder)
        found = Addressing.load(folder)
        check_same(found, given)
        for field in dataclasses.fields(Addressing):
            np.testing.assert_equal(getattr(found, field.name), getattr(given, field.name))
        assert found.layers == given.layers
        assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["addressing.json", "addressing.npz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_load_refuses_broken_files(addressing, tmp_path, name, damage):
    addressing.save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -200])
    with pytest.raises(UserError, match="addressing") as raised:
        Addressing.load(tmp_path)
    assert str(tmp_path) in one_line(raised)


def test_load_refuses_changed_numbers(addressing, tmp_path):
    addressing.save(tmp_path)
    path = tmp_path / "addressing.json"
    state = json.loads(path.read_text())
    state["layers"][0]["multipliers"][0] += 2
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="damaged") as raised:
        Addressing.load(tmp_path)
    assert addressing.fingerprint in one_line(raised)
