"""Where rows lie, rows that cannot be read, and memory that is switched off."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.config import ServeConfig
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.read_counts import Frequency, save_frequency
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.serve import staged_rows as serve_memory
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.open_memories import open_memories
from engram_jax.serve.request import Finish, SamplingParams
from engram_jax.serve.staged_rows import StagedMemory
from engram_jax.training.state import weights_of
from tests.serve.served import (
    SERVE,
    Damaged,
    host_memory,
    host_tables,
    logprobs,
    make_engine,
    model,
    prompts,
    rows_of,
    served,
)
from tests.serve.web import Running
from tests.tiny import tiny


def memory_file(tmp_path, name="float32"):
    program, weights = model()
    stored = RowFormat(name, program.config.model.engram.dim)
    layers = {k: (stored, len(r), [np.asarray(r)]) for k, r in weights.rows.items()}
    path = tmp_path / "memory.safetensors"
    write_memory(path, layers, program.addressing.fingerprint)
    return open_memory(path, program.addressing.fingerprint)


@pytest.mark.parametrize(
    "kind", ["host", "hot", "all hot", "disk", "cached", "cached one", "three tiers"]
)
@pytest.mark.parametrize("merge_from", [1, 10**9])
def test_no_bit_depends_on_where_rows_lie(expected, tmp_path, monkeypatch, kind, merge_from):
    monkeypatch.setattr(serve_memory, "MERGE_FROM", merge_from)
    program, weights = model()
    if kind == "host":
        made = host_memory(program, weights)
    elif kind == "hot":
        made = host_memory(program, weights, np.arange(100, 3, -2))
    elif kind == "all hot":
        made = host_memory(program, weights, np.arange(len(weights.rows["1"]), dtype=np.int32))
    else:
        source = memory_file(tmp_path).disk("1")
        hot = np.arange(100, 3, -2) if kind == "three tiers" else None
        if kind != "disk":
            source = CachedTable(source, 1 if kind == "cached one" else 64)
        made = {"1": StagedMemory(program, source, hot)}
        if hot is not None:  # they do not fill the cache, too
            assert source.counters.snapshot().lookups == 0
    found, stats = served(memory=made)
    assert found == expected
    assert served(memory=made)[0] == expected  # the cache is in another state now
    if kind == "all hot":
        assert stats["rows_moved_rows"] == 0 and stats["rows_hits_device"] == stats["rows_lookups"]
    else:
        merged = merge_from == 1 or kind in ("hot", "three tiers")  # else padding is moved, too
        most = stats["rows_lookups"] if merged else np.inf
        assert 0 < stats["rows_moved_rows"] <= most
    if kind == "three tiers":
        tiers = ("rows_hits_device", "rows_hits_host_cache", "rows_file_bytes")
        assert all(stats[tier] > 0 for tier in tiers)


def test_a_damaged_file_is_no_answer(tmp_path):
    program, weights = model()
    memory_file(tmp_path)
    path = tmp_path / "memory.safetensors"
    content = bytearray(path.read_bytes())
    row = np.asarray(weights.rows["1"])[40].tobytes()
    assert content.count(row) == 1
    content[content.find(row)] ^= 1
    path.write_bytes(content)  # 148 rows are one block: whoever reads one, reads the damage
    found, _ = served(memory={"1": StagedMemory(program, open_memory(path).disk("1"))})
    for answer in found:
        assert (answer.finish, answer.tokens) == (Finish.ERROR, ())
        assert "memory.safetensors" in answer.error and "\n" not in answer.error


def test_a_file_that_is_copied_over_is_no_answer_either(tmp_path, caplog):
    """The server goes on, says so, and is well again with the file that it opened. Which file it is
    stands in its log, under the request's id, and in nothing that a client is sent."""
    program, weights = model()
    file = memory_file(tmp_path)
    path = tmp_path / "memory.safetensors"
    first = path.read_bytes()
    stored = RowFormat("float32", program.config.model.engram.dim)
    other = np.asarray(weights.rows["1"])[::-1]
    write_memory(tmp_path / "other", {"1": (stored, len(other), [other])}, file.fingerprint)
    engine = make_engine({"1": StagedMemory(program, file.disk("1"))})
    with Running(engine) as web:
        before = web.complete([1, 2, 3], temperature=0, return_token_ids=True).json["choices"]
        path.write_bytes((tmp_path / "other").read_bytes())
        answer = web.complete([1, 2, 3], temperature=0)
        assert answer.status == 500 and answer.error["type"] == "server_error"
        told = "rows of the memory could not be read; the server's log says which"
        assert answer.error["message"] == told
        stream = web.complete([1, 2, 3], stream=True)
        (event,) = stream.events
        assert event["error"]["message"] == told
        ids = [answer.json["request_id"], event["request_id"]]
        assert ids == [a.headers["x-request-id"] for a in (answer, stream)]
        ours = [record for record in caplog.records if record.name.startswith("engram_jax")]
        lines = [record.getMessage() for record in ours]
        assert len(lines) == len(ids), caplog.text
        for line, number in zip(lines, ids, strict=True):
            assert line.startswith(f"request {number}: {path}: layer 1, tensor")
            assert "was changed" in line
        health = web.get("/health")
        assert (health.status, health.json) == (200, {"status": "degraded", "memory": told})
        assert str(tmp_path).encode() not in answer.body + stream.body
        assert web.stats()["engram_read_errors"] == 2
        path.write_bytes(first)
        again = web.complete([1, 2, 3], temperature=0, return_token_ids=True)
        assert again.json["choices"] == before
    engine.close()


def test_one_sequence_alone_is_told_of_its_damaged_row(expected):
    """Of a batch whose rows cannot all be read, the others go on."""
    program, weights = model()

    texts = [[*p, *a.tokens] for p, a in zip(prompts(), expected, strict=True)]
    readers = {row: [i for i, t in enumerate(texts) if row in rows_of(t)] for row in range(148)}
    row, who = min(((r, w) for r, w in readers.items() if w), key=lambda x: len(x[1]))
    source = Damaged(host_tables(program, weights)["1"], [row])
    found, _ = served(memory={"1": StagedMemory(program, source)})
    assert 0 < len(who) < len(found)
    for i, answer in enumerate(found):
        if i in who:
            assert (answer.finish, answer.error) == (Finish.ERROR, "memory: block 3: damaged")
        else:
            assert answer == expected[i]


@pytest.mark.parametrize("order", [1, -1])
def test_a_neighbours_padding_reads_no_damaged_row(order):
    """Padding repeats a row of the batch's first sequence, which may be the damaged one."""
    program, weights = model()
    long, short = [3, 1, 4, 1, 5, 9, 2, 6], [10, 20, 30]
    params = SamplingParams(max_tokens=1, logprobs=5)
    given = [long, short][::order]
    (alone,), _ = served(params, [short])
    bad = sorted(set(rows_of(long)[0, 0].tolist()) - set(rows_of(short).reshape(-1).tolist()))
    source = Damaged(host_tables(program, weights)["1"], bad[:1])
    found, _ = served(params, given, memory={"1": StagedMemory(program, source)})
    assert found[::order][0].finish == Finish.ERROR
    assert found[::order][1] == alone


def test_one_of_two_layers_can_be_switched_off():
    program, state = tiny(**{"model.engram.layers": (0, 2)})
    weights = weights_of(program, state)
    steps = EngineSteps(program, dataclasses.replace(SERVE, off_layers=(2,)))
    memory = {"0": host_memory(program, weights)["0"]}
    engine = Engine(program, weights, memory, steps)
    prompt = prompts((9,))[0]
    (found,) = engine.generate([prompt], SamplingParams(max_tokens=1, logprobs=20))
    engine.close()
    canonical = canonicalise(np.array([prompt]), program.addressing.compression)
    first = np.asarray(weights.rows["0"])[addresses(canonical, program.addressing.layers[0])]
    net = program.model(weights.params, weights.router_bias)
    positions, ones = np.arange(9)[None], np.ones((1, 9), np.int32)
    net.engrams["2"].projection[...] *= 0  # neither key nor value
    net.engrams["2"].bias[...] *= 0
    out = net(np.array([prompt]), {"0": first, "2": first}, positions, ones)
    wanted = logprobs(np.asarray(net.logits(out.hidden))[0, -1])
    top = found.logprobs[0].top
    np.testing.assert_allclose(list(top.values()), wanted[list(top)], atol=2e-5)


def forward_with(prompt, rows=None, mask=None):
    program, weights = model()
    net = program.model(weights.params, weights.router_bias)
    tokens = np.array([prompt])
    positions = np.arange(len(prompt))[None]
    found = net(tokens, {"1": rows}, positions, np.ones_like(tokens), mask)
    return np.asarray(net.logits(found.hidden))[0]


@pytest.mark.parametrize("what", ["all", "layer", "order 2", "order 3"])
def test_switching_memory_off(what, expected):
    _, weights = model()
    prompt = prompts()[5]
    rows = np.asarray(weights.rows["1"])[rows_of(prompt)]
    switch = {"off_layers": (-1,) if what == "all" else (1,)}
    mask = np.zeros((1, len(prompt)), bool)
    if what.startswith("order"):
        order = int(what[-1])
        switch, mask = {"off_orders": (order,)}, None
        rows = rows.copy()
        rows[:, :, (order - 2) * 2 : (order - 1) * 2] = 0
    wanted = logprobs(forward_with(prompt, rows, mask)[-1])
    memory = {} if "off_layers" in switch else None
    params = SamplingParams(max_tokens=1, logprobs=20)
    (found,), stats = served(params, [prompt], memory=memory, **switch)
    ids = list(found.logprobs[0].top)
    np.testing.assert_allclose(list(found.logprobs[0].top.values()), wanted[ids], atol=2e-5)
    assert abs(found.logprobs[0].logprob - expected[5].logprobs[0].logprob) > 1e-3
    if "off_layers" in switch:
        assert stats.get("rows_lookups", 0) == 0


def test_hot_rows_do_not_fill_the_host_cache(tmp_path):
    """The file, a cache of its rows, and the most frequent ones on the device: each row once."""
    program, weights = model()
    memory_file(tmp_path)
    rows = len(weights.rows["1"])
    ids = np.random.default_rng(0).permutation(rows).astype(np.int32)
    counted = Frequency(ids, np.arange(rows, 0, -1), rows, rows * (rows + 1) // 2)
    fingerprint = program.addressing.fingerprint
    save_frequency(tmp_path / "counts.npz", {"1": counted}, fingerprint, 1)
    serve = ServeConfig(
        memory="disk",
        memory_file=str(tmp_path / "memory.safetensors"),
        frequency_file=str(tmp_path / "counts.npz"),
        device_cache=0.1,
        host_cache=0.2,
    )
    cache = open_memories(program, serve)["1"].source
    hot, behind = ids[: rows // 10], ids[rows // 10 :][: rows // 10]
    assert cache._sets.look(hot, np.empty(hot.size, np.int32)) == 0
    assert cache._sets.look(behind, np.empty(behind.size, np.int32)) > behind.size // 2
