"""The engine against the plain forward pass, whatever runs beside, wherever the rows lie."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.address.hashing import addresses, canonicalise
from engram_jax.config import GenerateConfig
from engram_jax.errors import UserError
from engram_jax.generate import Generator
from engram_jax.memory.store.cache import CachedTable
from engram_jax.memory.store.file import open_memory, write_memory
from engram_jax.memory.store.rows import RowFormat
from engram_jax.memory.store.source import HostTable
from engram_jax.restore import weights_of
from engram_jax.sampling import sample
from engram_jax.serve import memory as serve_memory
from engram_jax.serve.engine import Engine
from engram_jax.serve.memory import StagedMemory
from engram_jax.serve.request import Completion, Finish, QueueFullError, SamplingParams
from engram_jax.serve.steps import Steps
from tests.serve.served import SERVE, full_logits, host_memory, host_tables, make_engine, model
from tests.tiny import VOCAB, tiny

LENGTHS = (1, 7, 8, 9, 15, 16, 30, 41)  # around chunks and pages of 8


def prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def logprobs(logits):
    x = np.asarray(logits, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


GREEDY = SamplingParams(max_tokens=12, logprobs=5)


def served(params=GREEDY, given=None, **engine):
    made = make_engine(**engine)
    found = made.generate(prompts() if given is None else given, params)
    stats = made.stats()
    assert stats["running"] == stats["waiting"] == stats["moved_out"] == 0
    assert stats["free_pages"] == stats["pages"]
    made.close()
    return found, stats


@pytest.fixture(scope="module")
def expected():
    """What the default engine answers: the other tests compare with it to the last bit."""
    return served()[0]


def test_tokens_and_log_probabilities_are_the_forward_pass(expected):
    for prompt, found in zip(prompts(), expected, strict=True):
        assert found.finish == Finish.LENGTH and len(found.tokens) == 12
        logits = full_logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
        assert found.tokens == tuple(logits.argmax(-1).tolist())
        wanted = logprobs(logits)
        for row, token, own in zip(wanted, found.tokens, found.logprobs, strict=True):
            assert own.token == token
            np.testing.assert_allclose(own.logprob, row[token], atol=2e-5)
            best = np.sort(row)[::-1][:5]
            np.testing.assert_allclose(list(own.top.values()), best, atol=2e-5)
            np.testing.assert_allclose([row[t] for t in own.top], best, atol=2e-5)


def test_sampled_tokens_are_the_samplers_for_each_request_alone():
    params = [
        SamplingParams(max_tokens=10, temperature=t, top_p=p, top_k=k, seed=s)
        for t, p, k, s in [
            (0.7, 1.0, 0, 0),
            (1.0, 0.9, 0, 1),
            (1.3, 0.5, 7, 2**32 - 1),
            (0.0, 0.3, 1, 5),
            (1e-42, 1.0, 0, 3),
            (5.0, 1.0, 61, 3),
            (2.0, 0.2, 3, 9),
            (1.0, 1.0, 0, 1),
        ]
    ]
    found, _ = served(params)
    for prompt, own, answer in zip(prompts(), params, found, strict=True):
        logits = full_logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        for step, token in enumerate(answer.tokens):
            key = jax.random.fold_in(jax.random.key(own.seed), step)
            how = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
            assert int(sample(logits[step : step + 1], key, **how)[0]) == token, (own, step)


@pytest.mark.parametrize("order", [slice(None, None, -1), [3], [7, 0], [5, 5, 5, 2]])
def test_no_bit_depends_on_what_runs_beside(expected, order):
    index = np.arange(len(LENGTHS))[order]
    found, _ = served(given=[prompts()[i] for i in index])
    assert found == [expected[i] for i in index]


@pytest.mark.parametrize("pages", [8, 9, 12])
def test_moving_out_and_back_changes_no_bit(expected, pages):
    found, stats = served(pages=pages)
    assert stats["evictions"] > 0
    assert found == expected


def test_a_longer_capacity_changes_no_bit():
    """Pages behind a sequence's end are not read, however many there may be."""
    assert served(capacity=256)[0] == served(capacity=512)[0]


def memory_file(tmp_path, name="float32"):
    program, weights = model()
    stored = RowFormat(name, program.config.model.engram.dim)
    layers = {k: (stored, len(r), [np.asarray(r)]) for k, r in weights.rows.items()}
    path = tmp_path / "memory.safetensors"
    write_memory(path, layers, program.addressing.fingerprint)
    return open_memory(path, program.addressing.fingerprint)


@pytest.mark.parametrize("kind", ["host", "hot", "all hot", "disk", "cached", "cached one"])
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
        if kind != "disk":
            source = CachedTable(source, 64 if kind == "cached" else 1)
        made = {"1": StagedMemory(program, source)}
    found, stats = served(memory=made)
    assert found == expected
    assert served(memory=made)[0] == expected  # the cache is in another state now
    if kind == "all hot":
        assert stats["rows_moved_rows"] == 0 and stats["rows_hits_device"] == stats["rows_lookups"]
    else:
        assert 0 < stats["rows_moved_rows"] <= stats["rows_lookups"]


def test_prompt_log_probabilities():
    params = SamplingParams(max_tokens=0, logprobs=3, prompt_logprobs=True)
    found, _ = served(params)
    for prompt, answer in zip(prompts(), found, strict=True):
        assert answer.finish == Finish.LENGTH and answer.tokens == ()
        assert [p.token for p in answer.prompt_logprobs] == prompt[1:]
        wanted = logprobs(full_logits(prompt))
        for at, own in enumerate(answer.prompt_logprobs):
            np.testing.assert_allclose(own.logprob, wanted[at, own.token], atol=2e-5)
            assert len(own.top) == 3
    both = SamplingParams(max_tokens=12, logprobs=5, prompt_logprobs=True)
    again, _ = served([both, *[GREEDY] * (len(LENGTHS) - 1)])
    assert [a.tokens for a in again] == [a.tokens for a in served()[0]]
    assert len(again[0].prompt_logprobs) == 0 and not again[3].prompt_logprobs


def test_sequences_end_where_they_should(expected):
    tokens = expected[3].tokens
    at = next(i for i, t in enumerate(tokens) if t not in tokens[:i] and i > 2)
    prompt = [prompts()[3]]

    def one(params, eos_id=None):
        return served(params, prompt, eos_id=eos_id)[0][0]

    by_id = one(SamplingParams(max_tokens=12, stop_ids=(tokens[at],)))
    assert (by_id.tokens, by_id.finish) == (tokens[:at], Finish.STOP)
    assert one(SamplingParams(max_tokens=12), eos_id=tokens[at]) == by_id
    through = one(SamplingParams(max_tokens=12, ignore_eos=True), eos_id=tokens[at])
    assert (through.tokens, through.finish) == (tokens, Finish.LENGTH)
    assert one(SamplingParams(max_tokens=1)).tokens == tokens[:1]


@pytest.mark.parametrize("pages", [0, 8])
def test_a_prompt_that_fills_the_capacity_is_scored(pages):
    (prompt,) = prompts([64])
    params = SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
    (found,), _ = served(params, [prompt], pages=pages)
    wanted = logprobs(full_logits(prompt))[np.arange(63), prompt[1:]]
    np.testing.assert_allclose([p.logprob for p in found.prompt_logprobs], wanted, atol=2e-5)


def test_full_sequences_fit():
    (prompt,) = prompts([52])
    (found,), _ = served(GREEDY, [prompt])
    logits = full_logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
    assert found.tokens == tuple(logits.argmax(-1).tolist())


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("pages", [0, 9])
def test_cancelling_disturbs_nobody(expected, steps, pages):
    engine = make_engine(pages=pages)
    numbers = [engine.submit(p, GREEDY) for p in prompts()]
    deltas = {n: [] for n in numbers}
    gone = numbers[1::2]
    for turn in range(10_000):
        if turn == steps:
            for n in [*gone, *gone, -1, 10**9]:
                engine.cancel(n)
        for delta in engine.step():
            deltas[delta.request].append(delta)
        if not engine.busy:
            break
    found = [Completion.of(deltas[n]) for n in numbers]
    for i, (number, answer) in enumerate(zip(numbers, found, strict=True)):
        if number in gone:
            assert answer.finish == Finish.CANCELLED
            assert answer.tokens == expected[i].tokens[: len(answer.tokens)]
        else:
            assert answer == expected[i]
    stats = engine.stats()
    assert stats["free_pages"] == stats["pages"] and stats["running"] == 0
    assert engine.generate(prompts(), GREEDY) == expected


def rows_of(tokens):
    program, _ = model()
    canonical = canonicalise(np.array([tokens]), program.addressing.compression)
    return addresses(canonical, program.addressing.layers[1])


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


class Damaged:
    """A source some of whose rows cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad
        self.rows, self.format, self.counters = source.rows, source.format, source.counters

    def gather(self, ids, out):
        if np.isin(ids, self.bad).any():
            raise UserError("memory: block 3: damaged")
        self.source.gather(ids, out)


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


def test_numbers_that_are_none_stay_with_their_sequence():
    """Its pages go to others, who see what is left in them only with weight zero."""
    program, weights = model()
    rows = np.asarray(weights.rows["1"]).copy()
    poison, other = [3, 1, 4, 1, 5, 9, 2, 6], [10, 20, 30, 11, 12]
    params = SamplingParams(max_tokens=4, logprobs=5)
    (wanted,), _ = served(params, [other])
    used = set(rows_of([*other, *wanted.tokens]).reshape(-1).tolist())
    bad = sorted(set(rows_of(poison).reshape(-1).tolist()) - used)[0]
    rows[bad] = np.nan
    stored = RowFormat("float32", rows.shape[1])
    made = {"1": StagedMemory(program, HostTable(stored, [rows.view(np.uint8)]))}
    engine = make_engine(memory=made)
    (broken,) = engine.generate([poison], params)
    assert np.isnan(broken.logprobs[0].logprob)  # it is read
    assert engine.generate([other], params) == [wanted]
    assert engine.generate([poison, other], params)[1] == wanted
    engine.close()


def test_one_of_two_layers_can_be_switched_off():
    program, state = tiny(**{"model.engram.layers": (0, 2)})
    weights = weights_of(program, state)
    steps = Steps(program, dataclasses.replace(SERVE, off_layers=(2,)))
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


def test_what_can_never_be_served_is_refused_at_once(engine):
    def refused(prompt, words, **params):
        with pytest.raises(UserError, match=words):
            engine.submit(prompt, SamplingParams(**params))

    refused([], "at least one token")
    refused([0, VOCAB], f"token id {VOCAB}: must be from 0 to {VOCAB - 1}")
    refused([-1], "token id -1")
    refused([1] * 60, "60 tokens and max_tokens = 5: must be at most 64", max_tokens=5)
    refused([1], "top_k = 62", top_k=62, max_tokens=1)
    refused([1], "stop: must be empty", stop=("x",), max_tokens=1)
    assert not engine.busy


def test_the_queue_is_bounded():
    engine = make_engine(queue=2)
    for _ in range(2):
        engine.submit([1], GREEDY)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit([1], GREEDY)
    while engine.busy:
        engine.step()
    assert len(engine.generate(prompts(), GREEDY)) == len(LENGTHS)  # it waits by itself
    engine.close()


def test_streaming_gives_a_token_at_a_time_and_can_be_left(engine, expected):
    deltas = list(engine.stream(prompts()[2], GREEDY))
    assert Completion.of(deltas) == expected[2]
    assert [len(d.tokens) for d in deltas] == [1] * 12 + [0]
    for delta in engine.stream(prompts()[2], GREEDY):
        assert delta.tokens == expected[2].tokens[:1]
        break
    assert engine.generate(prompts(), GREEDY) == expected
    assert not engine.busy and engine.stats()["running"] == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"stop": ("",)}, "stop = "),
        ({"stop": ("a",) * 17}, "stop = "),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"prompt_logprobs": True}, "prompt_logprobs = True"),
    ],
)
def test_impossible_settings(values, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**values)


MODELS = {
    "no memory": {"model.engram.layers": ()},
    "layers 0 and 2": {"model.engram.layers": (0, 2)},
    "no convolution": {"model.engram.form": "v41"},
    "dialect qwen": {
        "model.engram.form": "qwen",
        "model.engram.hash_dialect": "qwen",
        "tokenizer.canonical_vocab_size": VOCAB,
        "tokenizer.eos_id": 7,
    },
    "one stream, tied": {"model.hyper.streams": 1, "model.tie_embeddings": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_decode_as_the_plain_generator(name):
    program, state = tiny(**MODELS[name])
    weights = weights_of(program, state)
    steps = Steps(program, dataclasses.replace(SERVE, pages=9))
    engine = Engine(program, weights, host_memory(program, weights), steps)
    given = [*prompts((1, 9, 30)), [7, 3, 7, 7, 1, 2, 7]]
    found = engine.generate(given, SamplingParams(max_tokens=14))
    generator = Generator(program, weights)
    how = GenerateConfig(max_tokens=14, temperature=0.0)
    assert [list(f.tokens) for f in found] == [generator.complete([p], how)[0] for p in given]
    engine.close()
