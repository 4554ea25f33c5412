"""The data pipeline's form of the hash against the authority."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from engram_jax.addressing import Addressing, BatchAddresser, build_compression, hash_numpy
from engram_jax.config.errors import UserError
from tests.addressing.cases import GEOMETRIES, planned


@pytest.fixture(params=GEOMETRIES)
def addressing(request) -> Addressing:
    vocab, fill = GEOMETRIES[request.param][1:3]
    compression = np.random.default_rng(0).permutation(vocab).astype(np.int32)
    return Addressing(compression, vocab, fill, planned(request.param), "paper", -1, "")


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 9001), (40,)])
def test_pipeline_equals_the_authority(addressing, shape):
    rng = np.random.default_rng(9)
    tokens = rng.integers(-2, len(addressing.compression), shape).astype(np.int32)
    segments = np.sort(rng.integers(1, 1 + max(1, shape[-1] // 8), shape), axis=-1)
    addresser = pickle.loads(pickle.dumps(BatchAddresser(addressing)))
    for given in (None, segments):
        found = addresser(tokens, given)
        assert list(found) == [str(layer_id) for layer_id in addressing.layers]
        canonical = hash_numpy.canonicalise(tokens, addressing.compression)
        for layer_id, layer in addressing.layers.items():
            rows = found[str(layer_id)]
            assert rows.dtype == np.int32
            np.testing.assert_array_equal(rows, hash_numpy.addresses(canonical, layer, given))


def test_pipeline_gives_the_golden_addresses_from_raw_ids(golden, published_tokenizer):
    for version, name in (("0.2.0", "demo"), ("0.3.0", "v41")):
        expected = golden(f"addressing_{name}")
        compression = build_compression(published_tokenizer(version))
        layers = planned(name)
        addressing = Addressing(compression, GEOMETRIES[name][1], 2, layers, "paper", -1, "")
        found = BatchAddresser(addressing)(expected["raw_ids"])
        for layer_id, layer in layers.items():
            hashes = found[str(layer_id)] - np.array(layer.offsets)
            np.testing.assert_array_equal(hashes, expected[f"hashes_{layer_id}"])


def test_pipeline_refuses_ids_the_tokenizer_does_not_have(addressing):
    with pytest.raises(UserError, match="token id"):
        BatchAddresser(addressing)(np.array([[0, len(addressing.compression)]]))
