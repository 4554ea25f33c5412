"""The tiny model behind an engine, and what its plain forward pass says."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import jax
import numpy as np

from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.table import lookup
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import SamplingParams
from engram_jax.serve.row_fetch import DeviceMemory
from engram_jax.serve.staged_rows import StagedMemory
from engram_jax.training.state import weights_of
from tests.tiny import VOCAB, tiny

SERVE = ServeConfig(
    sequences=3, capacity=64, page=8, prefill_chunk=8, prefill_sequences=2, queue=10_000
)


@lru_cache
def model():
    """(program, weights) of the tiny model."""
    program, state = tiny()
    return program, weights_of(program, state)


def device_memory(program, weights):
    return {k: DeviceMemory(program, rows) for k, rows in weights.rows.items()}


def host_tables(program, weights, name="float32"):
    """Engram layer id -> the table's rows in DRAM, as they are."""
    stored = RowFormat(name, program.config.model.engram.dim)
    return {k: HostTable(stored, stored.encode(np.asarray(r))) for k, r in weights.rows.items()}


def host_memory(program, weights, hot=None):
    sources = host_tables(program, weights)
    return {k: StagedMemory(program, source, hot) for k, source in sources.items()}


class Damaged:
    """A source some of whose rows cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad
        self.rows, self.format, self.counters = source.rows, source.format, source.counters

    def gather(self, ids, out):
        if np.isin(ids, self.bad).any():
            raise UserError("memory: block 3: damaged")
        self.source.gather(ids, out)


def make_engine(memory=None, tokenizer=None, eos_id=None, **serve):
    """An engine; serve: keys of config.serve."""
    program, weights = model()
    if memory is None:
        memory = device_memory(program, weights)
    steps = compiled(dataclasses.replace(SERVE, **serve))
    return Engine(program, weights, memory, steps, tokenizer, eos_id)


@lru_cache
def compiled(serve):
    """One compilation for all engines of a configuration."""
    return EngineSteps(model()[0], serve)


@lru_cache
def _forward():
    program, _ = model()

    def run(weights, tokens, addresses):
        rows = {k: lookup(weights.rows[k], a) for k, a in addresses.items()}
        net = program.model(weights.params, weights.router_bias)
        positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
        segments = jax.numpy.ones_like(tokens)
        return net.logits(net(tokens, rows, positions, segments).hidden)

    return jax.jit(partial(run))


def full_logits(tokens):
    """float32 [T, V]: the uncached forward pass over one sequence, hashed by NumPy's authority."""
    program, weights = model()
    padded = np.zeros((1, SERVE.capacity), np.int32)  # later tokens change nothing before them
    padded[0, : len(tokens)] = tokens
    canonical = canonicalise(padded, program.addressing.compression)
    rows = {
        str(k): addresses(canonical, layer).astype(np.int32)
        for k, layer in program.addressing.layers.items()
    }
    return np.asarray(_forward()(weights, padded, rows))[0, : len(tokens)]


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


def rows_of(tokens):
    program, _ = model()
    canonical = canonicalise(np.array([tokens]), program.addressing.compression)
    return addresses(canonical, program.addressing.layers[1])
