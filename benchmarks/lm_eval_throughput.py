"""What lm-eval's adapter costs beside a bare forward pass over the same tokens.

    python -m benchmarks.lm_eval_throughput [--json PATH]

The demo's model with random weights. Pairs of random tokens: contexts of 16 to 224 tokens, each
with one continuation of 8 (nothing to share), and the same contexts with four (a question with its
choices). The bare pass is `evaluation/tasks.py: jit_scores`, compiled for every length: pairs
sorted by length, batches padded to the next multiple of 32, logits at the continuation alone, at
the fastest of some batch sizes. It computes a context again for every choice. Tokens are those of
the pairs, contexts and continuations, however often a way computes them.
Some of the pairs also go to a server of this process, one and eight at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

CONTEXTS, SHORTEST, LONGEST, CONTINUATION, CHOICES, ROUNDS = 64, 16, 224, 8, 4, 3
SIZES = (4, 8, 16, 32)
HTTP = 32  # pairs
Pairs = list[tuple[list[int], list[int]]]


def measure() -> Result:
    import jax
    import numpy as np
    from tokenizers import Tokenizer, models

    from benchmarks.demo_model import demo_config, demo_program
    from engram_jax.evaluation import tasks
    from engram_jax.harness.scorer import Scorer
    from engram_jax.serve.engine import Engine
    from engram_jax.serve.row_fetch import DeviceMemory
    from engram_jax.training.state import create_state, weights_of

    config = demo_config()
    serve = dataclasses.replace(
        config.serve, capacity=256, sequences=16, prefill_sequences=8, prefill_chunk=32, page=32
    )
    config = dataclasses.replace(config, serve=serve)
    program = demo_program(config)
    weights = weights_of(program, create_state(program))
    memory = {k: DeviceMemory(program, rows) for k, rows in weights.rows.items()}
    words = {f"w{n}": n for n in range(config.tokenizer.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    engine = Engine(program, weights, memory, tokenizer=tokenizer)
    scorer = Scorer(engine)
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(0, config.tokenizer.vocab_size, count).tolist()

    contexts = [draw(int(n)) for n in rng.integers(SHORTEST, LONGEST + 1, CONTEXTS)]
    work: dict[str, Pairs] = {
        "one continuation": [(context, draw(CONTINUATION)) for context in contexts],
        "four choices": [(c, draw(CONTINUATION)) for c in contexts for _ in range(CHOICES)],
    }
    compiled = tasks.jit_scores(program)

    def bare(pairs: Pairs, size: int) -> list[float]:
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        found = [0.0] * len(pairs)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            rows = [([*pairs[i][0], *pairs[i][1]], len(pairs[i][0])) for i in part]
            length = -(-max(len(ids) for ids, _ in rows) // 32) * 32
            batch = tasks._batch(rows, size, length, CONTINUATION)
            sums = jax.device_get(compiled(weights, batch, {}))[0]
            for place, number in enumerate(part):
                found[number] = float(sums[place])
        return found

    def adapter(pairs: Pairs) -> list[float]:
        # Nothing of an earlier call: its pages would be found.
        engine._schedule.prefixes.evict(engine._schedule.pages.total)
        return [value for value, _ in scorer.score(pairs)]

    figures, details = [], {}
    for name, pairs in work.items():
        ways: dict[str, Callable[[], Any]] = {
            f"bare, {size} at a time": functools.partial(bare, pairs, size) for size in SIZES
        }
        ways["adapter"] = functools.partial(adapter, pairs)
        values = {way: call() for way, call in ways.items()}
        for way, found in values.items():
            np.testing.assert_allclose(found, values["adapter"], atol=2e-3, err_msg=way)
        seconds = harness.take_turns(ways, rounds=ROUNDS, warm_up=1)
        details[name] = seconds
        tokens = sum(len(a) + len(b) for a, b in pairs)
        rates = {way: tokens / min(times) for way, times in seconds.items()}
        best = max((way for way in ways if way != "adapter"), key=rates.__getitem__)
        figures += [
            Figure(f"{name}: {best}", rates[best], "tokens/s", note="the fastest bare pass"),
            Figure(f"{name}: adapter", rates["adapter"], "tokens/s"),
            Figure(
                f"{name}: adapter, of the bare pass",
                rates["adapter"] / rates[best],
                "times",
                at_least=0.9,
            ),
        ]
    figures += over_http(engine, work["one continuation"][:HTTP])
    engine.close()
    setting = (
        f"{config.name}, {CONTEXTS} contexts of {SHORTEST} to {LONGEST} tokens, continuations of"
        f" {CONTINUATION}; the engine: {serve.sequences} sequences, prompts"
        f" {serve.prefill_sequences} x {serve.prefill_chunk} tokens; best of {ROUNDS} interleaved"
        " rounds"
    )
    return Result("lm_eval_throughput", setting, figures, {"seconds": details})


def over_http(engine: Any, pairs: Pairs) -> list[Figure]:
    """The pairs as lm-eval's `local-completions` sends them: echo, one request a pair."""
    import json
    import time
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    from tests.serve.web import Running

    tokens = sum(len(a) + len(b) for a, b in pairs)
    figures = []
    with Running(engine) as web:

        def ask(pair: tuple[list[int], list[int]]) -> None:
            body = {"model": engine.name, "prompt": [*pair[0], *pair[1]], "max_tokens": 1}
            body |= {"logprobs": 1, "echo": True, "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{web.port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request, timeout=600).read()

        for concurrency in (1, 8):
            with ThreadPoolExecutor(concurrency) as pool:
                list(pool.map(ask, pairs[:8]))  # compiled
                began = time.monotonic()
                list(pool.map(ask, pairs))
                rate = tokens / (time.monotonic() - began)
            figures.append(Figure(f"HTTP, {concurrency} at a time", rate, "tokens/s"))
    return figures


if __name__ == "__main__":
    harness.main(measure)
