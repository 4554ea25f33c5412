"""The Grain stream: epochs, processes, exact resumption, validation."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data import pipeline, prepare, train_batches, validation_batches
from engram_jax.data.packing import PackedSequences


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def fake_addresses(tokens: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    return {"1": np.stack([tokens * 3 + segments, tokens], axis=-1).astype(np.int32)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        same(a[k], b[k]) if isinstance(a[k], dict) else np.array_equal(a[k], b[k]) for k in a
    )


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order(prepared):
    data, config = prepared
    sequences = PackedSequences(data.store_train, config.data.seq_len, 0)
    count = len(sequences)
    every = sequences.batch(range(count))["tokens"]
    assert len({row.tobytes() for row in every}) == count
    batches = take(train_batches(data, config), 2 * count)
    rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
    epochs = [rows[i : i + count] for i in range(0, len(rows), count)]
    expected = sorted(row.tobytes() for row in every)
    assert len(epochs) == 2 * config.data.batch_size
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_stream_is_a_function_of_the_seed(prepared):
    data, config = prepared
    a, b = take(train_batches(data, config), 5), take(train_batches(data, config), 5)
    c = take(train_batches(data, with_data(config, seed=1)), 5)
    assert all(map(same, a, b))
    assert not any(map(same, a, c))


def test_batches_of_one(prepared):
    data, config = prepared
    iterator = train_batches(data, with_data(config, batch_size=1))
    iterator.set_state({**iterator.get_state(), "next_batch": 10**9})
    assert [batch["tokens"].shape for batch in take(iterator, 3)] == [(1, config.data.seq_len)] * 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(prepared, count):
    data, config = prepared
    whole = take(train_batches(data, config, addresses_fn=fake_addresses), 30)
    parts = [
        take(train_batches(data, config, rows, addresses_fn=fake_addresses), 30)
        for rows in np.split(np.arange(4), count)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            if key == "addresses":
                joined = np.concatenate([part[step][key]["1"] for part in parts])
                assert np.array_equal(joined, batch[key]["1"])
            else:
                assert parts[0][step][key].shape[0] == 4 // count
                assert np.array_equal(
                    np.concatenate([part[step][key] for part in parts]), batch[key]
                )


def test_resume_in_the_middle_of_an_epoch_is_exact(prepared):
    data, config = prepared
    uninterrupted = train_batches(data, config, addresses_fn=fake_addresses)
    expected = take(uninterrupted, 40)
    first = train_batches(data, config, addresses_fn=fake_addresses)
    take(first, 17)
    state = json.loads(json.dumps(first.get_state()))
    take(first, 3)  # read ahead after the state was taken: must not matter
    first.close()
    resumed = train_batches(data, config, addresses_fn=fake_addresses)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert all(map(same, take(resumed, 23), expected[17:]))
    resumed.set_state(state)  # and again, on an iterator that has moved
    assert same(next(resumed), expected[17])
    for iterator in (uninterrupted, resumed):
        iterator.close()


def test_worker_processes_change_nothing_and_resume(prepared):
    data, config = prepared
    threads = train_batches(data, config, addresses_fn=fake_addresses)
    expected = take(threads, 12)
    processes = train_batches(data, with_data(config, workers=2), addresses_fn=fake_addresses)
    processes.set_state(threads.get_state() | {"next_batch": 7})  # 7 is not a multiple of 2 workers
    assert all(map(same, take(processes, 5), expected[7:]))
    assert processes.get_state() == threads.get_state()
    processes.close()


def test_going_far_costs_no_replay(prepared):
    data, config = prepared
    iterator = train_batches(data, config)
    near, far = (iterator.get_state() | {"next_batch": n} for n in (10, 10**10))
    seconds = []
    for state in (near, far, near, far):
        iterator.set_state(state)
        begin = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - begin)
    assert iterator.get_state()["next_batch"] == 10**10 + 1
    assert max(seconds) < 5.0  # 10^10 batches replayed would take months


def test_states_of_other_data_are_refused(prepared):
    data, config = prepared
    state = train_batches(data, config).get_state()
    for changes, key in (
        ({"seed": 5}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"seq_len": 8}, "seq"),
    ):
        other = train_batches(data, with_data(config, **changes))
        with pytest.raises(UserError, match=f"has {key}"):
            other.set_state(state)
    with pytest.raises(UserError, match=r"has data = 'abc'.*same text and tokenizer.*--workdir"):
        train_batches(data, config).set_state(state | {"data": "abc"})


def test_impossible_batches_are_refused_with_numbers(prepared):
    data, config = prepared
    tokens = len(data.store_train)
    with pytest.raises(UserError, match=f"{tokens:,} tokens.*batch_size = 100000"):
        train_batches(data, with_data(config, batch_size=100_000))


def test_validation_is_finite_fixed_and_loses_nothing(prepared):
    data, config = prepared
    store = data.store_valid
    first, second = list(validation_batches(data, config)), list(validation_batches(data, config))
    assert all(map(same, first, second))
    assert all(batch["tokens"].shape == (4, 16) for batch in first)
    targets = np.concatenate([batch["targets"][batch["loss_mask"] == 1] for batch in first])
    is_first = np.zeros(len(store), bool)
    is_first[store.starts[:-1]] = True
    assert np.array_equal(targets, store.tokens[~is_first])
    assert len(list(validation_batches(data, config, limit=1))) == 1
    assert len(list(validation_batches(data, config, limit=10_000))) == len(first)


def test_validation_of_two_processes_joins_to_the_whole(prepared):
    data, config = prepared
    whole = list(validation_batches(data, config))
    parts = [list(validation_batches(data, config, np.array(r))) for r in ([0, 1], [2, 3])]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for a, b, batch in zip(*parts, whole, strict=True):
        for key in batch:
            assert np.array_equal(np.concatenate([a[key], b[key]]), batch[key])


def test_prepare_is_warm_the_second_time_and_says_what_it_did(prepared, monkeypatch):
    data, config = prepared

    def fail(*args):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("engram_jax.data.prepared.write_store", fail)
    lines: list[str] = []
    again = prepare(config, lines.append)
    assert again.fingerprint == data.fingerprint
    assert again.report == data.report
    assert any("documents" in line for line in lines)
    assert any("tokens to train on" in line for line in lines)
    assert again.bytes_per_token == data.store_valid.bytes_per_token > 1
    assert isinstance(train_batches(again, config), pipeline.TrainIterator)
