"""Losses by document and by context against loops over the text, token by token."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from engram_jax.data.packing import PackedSequences
from engram_jax.data.pipeline import train_batches, trained_sequences
from engram_jax.data.token_store import TokenStore
from engram_jax.evaluation.target_losses import (
    SeenContexts,
    context_lines,
    documents_of,
    losses_by_context,
    seen_contexts,
    target_positions,
    write_documents,
)
from tests.tiny import VOCAB, tiny_config

T = 20


def store_of(folder, seed: int, documents: int, low: int = 1) -> TokenStore:
    """Documents of random tokens, among them some of one token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, 60, documents)
    lengths[documents // 2] = low
    tokens = rng.choice(VOCAB, lengths.sum(), p=np.arange(VOCAB, 0, -1) / (VOCAB * (VOCAB + 1) / 2))
    folder.mkdir()
    tokens.astype(np.uint16).tofile(folder / "tokens.bin")
    np.save(folder / "starts.npy", np.cumsum([0, *lengths]))
    (folder / "store.json").write_text('{"dtype": "uint16", "eos_id": 0, "text_bytes": 1}')
    return TokenStore(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = {
        "store_train": store_of(folder / "a", 0, 40),
        "store_valid": store_of(folder / "b", 1, 9),
    }
    config = tiny_config(**{"data.seq_len": T, "data.batch_size": 4})
    return SimpleNamespace(config=config, prepared=SimpleNamespace(fingerprint="", **stores))


def targets(store: TokenStore) -> list[tuple[int, int]]:
    """(document, position in the store) of every target."""
    return [
        (document, at)
        for document in range(store.documents)
        for at in range(store.starts[document] + 1, store.starts[document + 1])
    ]


def context(store: TokenStore, document: int, at: int, n: int) -> tuple:
    """The n tokens before position `at`, None before the start of its document or sequence."""
    start = max(store.starts[document], (at - 1) // T * T)
    return tuple(int(store.tokens[i]) if i >= start else None for i in range(at - n, at))


def test_targets_and_their_documents(data):
    store = data.prepared.store_valid
    expected = targets(store)
    positions = target_positions(store)
    np.testing.assert_array_equal(positions, [at for _, at in expected])
    found = documents_of(store, positions)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [document for document, _ in expected])
    assert len(positions) == PackedSequences(store, T, 0, pad_tail=True).targets()


@pytest.mark.parametrize("batches", [3, 1000])
def test_contexts_seen_in_the_run_s_batches(data, batches):
    """The batches are the pipeline's own, read one by one."""
    config, store = data.config, data.prepared.store_valid
    found = seen_contexts(data, batches)
    assert found.orders == (2, 3, 4)
    iterator = train_batches(data.prepared, config)
    epoch = len(trained_sequences(data.prepared, config, batches)[0]) // 4 + 1
    known: set[tuple] = set()
    sequences = set()
    for _ in range(min(batches, epoch)):
        batch = next(iterator)
        for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
            sequences.add(tokens.tobytes())
            for t in range(T):
                ids = [None] * 4 + tokens[t - positions[t] : t + 1].tolist()
                known |= {tuple(ids[-n:]) for n in (2, 3, 4)}
    assert found.tokens == len(sequences) * T
    for k, n in enumerate(found.orders):
        expected = [context(store, *target, n) in known for target in targets(store)]
        np.testing.assert_array_equal(found.flags[:, k], expected)
    assert 0.02 < found.flags[:, 0].mean() < 0.98


def test_a_run_of_more_tokens_is_not_searched(data):
    train = dataclasses.replace(data.config.train, seen_tokens=239)
    small = SimpleNamespace(
        config=dataclasses.replace(data.config, train=train), prepared=data.prepared
    )
    found = seen_contexts(small, 3)
    n = len(targets(data.prepared.store_valid))
    assert (found.orders, found.tokens, found.flags.shape) == ((), 240, (n, 0))
    assert losses_by_context(found, {"m": np.ones(n)}) == {}


def test_the_archive_of_documents(data, tmp_path):
    store = data.prepared.store_valid
    rng = np.random.default_rng(3)
    all_targets = targets(store)
    nats, flags = rng.random(len(all_targets)), rng.random((len(all_targets), 2)) < 0.5
    path = tmp_path / "x.npz"
    write_documents(path, store, nats, SeenContexts((2, 3), flags, 1), 7)
    with np.load(path) as archive:
        found = dict(archive)
    expected = {
        "document": "int32",
        "nats": "float64",
        "targets": "int64",
        "orders": "int32",
        "seen_nats": "float64",
        "seen_targets": "int64",
        "step": "int64",
    }
    assert {name: str(x.dtype) for name, x in found.items()} == expected
    assert found["step"] == 7 and found["orders"].tolist() == [2, 3]
    for document in range(store.documents):
        mine = np.asarray([d == document for d, _ in all_targets])
        assert found["document"][document] == document
        assert found["targets"][document] == mine.sum()
        np.testing.assert_allclose(found["nats"][document], nats[mine].sum(), rtol=1e-12)
        for k in range(2):
            both = mine & flags[:, k]
            assert found["seen_targets"][document, k] == both.sum()
            np.testing.assert_allclose(found["seen_nats"][document, k], nats[both].sum())
    assert 0 in found["targets"]


def test_losses_by_context():
    nats = np.asarray([1.0, 2.0, 6.0])
    flags = np.asarray([[True, False], [True, False], [False, False]])
    found = losses_by_context(SeenContexts((2, 3), flags, 9), {"m": nats, "other": nats * 2})
    assert found == {
        "2": {
            "seen": {"targets": 2, "nats_per_token": {"m": 1.5, "other": 3.0}},
            "unseen": {"targets": 1, "nats_per_token": {"m": 6.0, "other": 12.0}},
        },
        "3": {
            "seen": {"targets": 0, "nats_per_token": {"m": None, "other": None}},
            "unseen": {"targets": 3, "nats_per_token": {"m": 3.0, "other": 6.0}},
        },
    }
    assert context_lines(found, "m") == [
        "context 2-gram   seen 1.500 over 2 tokens   unseen 6.000 over 1 tokens",
        "context 3-gram   seen - over 0 tokens   unseen 3.000 over 3 tokens",
    ]
