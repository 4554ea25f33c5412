"""Eight answers to one long prompt: computed eight times, once, and found in the cache.

    python -m benchmarks.shared_prompts [--json PATH]

The demo's model with random weights, its tables on the device. Each way is the same request: eight
greedy answers of 16 tokens to 960 tokens. Apart: every sequence has a `cache_salt` of its own.
Together: all have one that no earlier request had. Again: one that an earlier request had.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

from benchmarks import harness
from benchmarks.harness import Figure, Result

PROMPT, ANSWER, CHOICES, ROUNDS = 960, 16, 8, 7


def measure() -> Result:
    import numpy as np

    from benchmarks.demo_model import demo_config, demo_program
    from engram_jax.serve.engine import Engine
    from engram_jax.serve.request import Completion, SamplingParams
    from engram_jax.serve.row_fetch import DeviceMemory
    from engram_jax.training.state import create_state, weights_of

    config = demo_config()
    serve = dataclasses.replace(config.serve, capacity=1024, pages=512)  # room to keep all
    config = dataclasses.replace(config, serve=serve)
    program = demo_program(config)
    weights = weights_of(program, create_state(program))
    memory = {k: DeviceMemory(program, rows) for k, rows in weights.rows.items()}
    engine = Engine(program, weights, memory)
    engine.warm_up()
    prompt = np.random.default_rng(0).integers(0, config.tokenizer.vocab_size, PROMPT).tolist()
    numbers = itertools.count()
    computed: dict[str, list[float]] = {}
    answers: list[list[Completion]] = []

    def request(name: str, salts: list[str]) -> None:
        params = [
            SamplingParams(max_tokens=ANSWER, ignore_eos=True, cache_salt=salt) for salt in salts
        ]
        before = engine.stats()["prompt_tokens"]
        answers.append(engine.generate([prompt] * CHOICES, params))
        computed.setdefault(name, []).append(engine.stats()["prompt_tokens"] - before)

    ways = {
        "apart": lambda: request("apart", [f"{next(numbers)}" for _ in range(CHOICES)]),
        "together": lambda: request("together", [f"{next(numbers)}"] * CHOICES),
        "again": lambda: request("again", ["again"] * CHOICES),
    }
    seconds = harness.take_turns(ways, rounds=ROUNDS)
    assert all(one == answers[0][0] for answer in answers for one in answer)
    engine.close()
    tokens = {name: statistics.median(counts[-ROUNDS:]) for name, counts in computed.items()}
    figures = [
        Figure(
            name,
            statistics.median(seconds[name]),
            "s",
            note=f"{tokens[name]:.0f} tokens of prompts computed",
        )
        for name in ways
    ]
    figures += [
        Figure(
            f"{name}, of the time apart", harness.ratio(seconds[name], seconds["apart"]), "times"
        )
        for name in ("together", "again")
    ]
    setting = (
        f"{config.name}, {CHOICES} answers of {ANSWER} tokens to a prompt of {PROMPT}, in chunks of"
        f" {config.serve.prefill_chunk}; medians of {ROUNDS} interleaved rounds"
    )
    return Result("shared_prompts", setting, figures, {"seconds": seconds, "tokens": tokens})


if __name__ == "__main__":
    harness.main(measure)
