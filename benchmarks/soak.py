"""Ten thousand random requests: every answer right, memory flat, nothing stuck.

    python -m benchmarks.soak [--requests N] [--http] [--seed N] [--json PATH] [--plot PATH]

The tiny model of the tests on an engine with few pages, so that sequences are moved out and back.
Prompts and answers of mixed lengths, greedy and sampled, log-probabilities, stop ids, requests that
are cancelled at some moment, bad ones, a queue that is full most of the time. benchmarks/
soak_reference.py judges. One thread calls the engine, with the table on the device and with it in
host memory; with --http, clients in threads do so by HTTP, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

SERVE = {"sequences": 6, "capacity": 64, "page": 8, "pages": 24, "queue": 12}
HOT = 40  # rows on the device, if the table is not
CLIENTS = 24  # more than the engine takes at once
WARM = 0.3  # share of the requests before which memory may grow


class Resident:
    """Resident memory over the requests, in MB."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def note(self, requests: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.points.append((requests, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))

    def slope(self) -> float:
        """MB per 1,000 requests after the warm-up."""
        import numpy as np

        x, y = np.array(self.points).T
        warm = x >= WARM * x[-1]
        return float(np.polyfit(x[warm], y[warm], 1)[0] * 1000)


def measure(
    requests: int = 10_000, over_http: bool = False, host: bool = False, seed: int = 0
) -> Result:
    """host: the table lies in DRAM, a part of it on the device."""
    import numpy as np

    from benchmarks.soak_reference import Reference
    from tests.serve.served import host_memory, make_engine, model
    from tests.serve.web import EOS, tokenizer

    program, weights = model()
    memory = host_memory(program, weights, hot=np.arange(HOT)) if host else None
    engine = make_engine(memory, tokenizer=tokenizer(), eos_id=EOS, **SERVE)
    reference = Reference(program, weights, engine.capacity, EOS, engine.tokenizer)
    resident, counts = Resident(), Counter[str]()
    began = time.perf_counter()
    drive = through_http if over_http else through_engine
    stats = drive(engine, range(seed, seed + requests), reference, resident, counts)
    verdict = reference.finish()
    seconds = time.perf_counter() - began
    engine.close()
    stuck = stats["running"] + stats["waiting"] + stats["moved_out"]
    stuck += stats["pages"] - stats["free_pages"]
    done = verdict.answers + counts["refused"]
    figures = [
        Figure("requests ended", done, "", at_least=requests),
        Figure("tokens compared", verdict.tokens, "", note=f"{verdict.drawn:,} of them drawn"),
        Figure("wrong answers", len(verdict.wrong), "", at_most=0),
        Figure(
            "ties",
            len(verdict.ties),
            "",
            note=f"largest explained by noise of {max(verdict.ties, default=0):g} of the logits",
        ),
        Figure("log-probabilities: largest error", verdict.logprob_error, "nats", at_most=1e-4),
        Figure("bad requests refused", counts["refused"], ""),
        Figure("cancelled on the way", verdict.cancelled, ""),
        Figure("queue full, tried again", counts["full"], "times"),
        Figure("moved out and back", stats["evictions"], "times"),
        Figure("left at the end: requests, pages", stuck, "", at_most=0),
        Figure("resident memory, slope", resident.slope(), "MB per 1,000 requests", at_most=1.0),
        Figure("time, reference included", seconds, "s"),
    ]
    name = "HTTP" if over_http else "the engine"
    name += ", table in host memory" if host else ", table on the device"
    details = {
        "label": name,
        "wrong": verdict.wrong[:10],
        "ties": verdict.ties,
        "resident_MB": resident.points,
    }
    return Result("soak", f"{requests:,} requests through {name}, seed {seed}", figures, details)


def through_engine(
    engine: Any, seeds: range, reference: Any, resident: Resident, counts: Counter[str]
) -> dict[str, float]:
    """One thread; as many at once as the queue takes. Returns the statistics at the end."""
    from benchmarks.soak_reference import Answer, ask
    from engram_jax.config.errors import UserError
    from engram_jax.serve.request import Completion, Finish, QueueFullError

    vocab = engine.program.config.tokenizer.vocab_size
    todo = [ask(seed, vocab, engine.capacity) for seed in reversed(seeds)]
    running: dict[int, tuple[Any, list[Any]]] = {}
    ended = 0

    def submit() -> bool:
        """The next request, if there is one and room for it."""
        nonlocal ended
        if not todo:
            return False
        try:
            running[engine.submit(todo[-1].prompt, todo[-1].params)] = todo[-1], []
        except QueueFullError:
            counts["full"] += 1
            return False
        except (UserError, OverflowError):
            if not todo[-1].wrong:
                raise
            counts["refused"] += 1
            ended += 1
        todo.pop()
        return True

    while todo or engine.busy:
        while submit():
            pass
        for number, (request, deltas) in list(running.items()):
            if request.cancel_after is not None and len(deltas) >= request.cancel_after:
                engine.cancel(number)
        for delta in engine.step():
            request, deltas = running[delta.request]
            deltas.append(delta)
            if delta.finish is None:
                continue
            del running[delta.request]
            done = Completion.of(deltas)
            cancelled = done.finish == Finish.CANCELLED
            logprobs = [p.logprob for p in (*done.prompt_logprobs, *done.logprobs)]
            finish = None if cancelled else done.finish
            reference.judge(Answer(request, list(done.tokens), finish, logprobs, done.text))
            ended += 1
            if ended % 20 == 0:
                resident.note(ended)
    assert not running
    return engine.stats()


def through_http(
    engine: Any, seeds: range, reference: Any, resident: Resident, counts: Counter[str]
) -> dict[str, float]:
    """Clients in threads, each with one request at a time. Returns the statistics at the end."""
    from benchmarks.soak_reference import ask
    from tests.serve.web import Running

    vocab = engine.program.config.tokenizer.vocab_size
    left, lock, failures = iter(seeds), threading.Lock(), list[BaseException]()
    ended = 0

    def client(port: int) -> None:
        nonlocal ended
        try:
            while True:
                with lock:
                    seed = next(left, None)
                if seed is None or failures:
                    return
                answer = _post(port, ask(seed, vocab, engine.capacity), seed, counts)
                with lock:
                    if answer is not None:
                        reference.judge(answer)
                    ended += 1
                    if ended % 20 == 0:
                        resident.note(ended)
        except BaseException as error:
            failures.append(error)

    with Running(engine) as web:
        threads = [threading.Thread(target=client, args=(web.port,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        stats = web.idle()
    return {name.removeprefix("engram_"): value for name, value in stats.items()}


def _post(port: int, request: Any, seed: int, counts: Counter[str]) -> Any:
    """The answer, or None if it was refused as it must be. A full queue is tried again."""
    from benchmarks.soak_reference import Answer
    from engram_jax.serve.request import Finish

    params, stream = request.params, seed % 2 == 0 or request.cancel_after is not None
    fields = {
        "model": "unnamed",
        "prompt": request.prompt,
        **{k: getattr(params, k) for k in ("max_tokens", "temperature", "top_p", "top_k", "seed")},
        "stop_token_ids": params.stop_ids,
        "ignore_eos": params.ignore_eos,
        "logprobs": params.logprobs,
        "echo": params.prompt_logprobs,
        "stream": stream,
        "return_token_ids": True,
    }
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(fields))
        answer = connection.getresponse()
        if answer.status != 429:
            break
        connection.close()
        counts["full"] += 1
        time.sleep(0.02)
    if answer.status != 200:
        message = answer.read()
        connection.close()
        if not (request.wrong and answer.status == 400):
            raise RuntimeError(f"{answer.status} {message!r} for {request}")
        counts["refused"] += 1
        return None
    choices: list[Any] = []
    if stream:
        for line in answer:
            if request.cancel_after is not None and len(choices) >= request.cancel_after:
                break
            if line.startswith(b"data: {"):
                choices += json.loads(line[6:])["choices"]
    else:
        choices = json.loads(answer.read())["choices"]
    connection.close()
    tokens = [token for choice in choices for token in choice["token_ids"]]
    reason = choices[-1]["finish_reason"] if choices else None
    logprobs = [
        p
        for c in choices
        if c["logprobs"]
        for p in c["logprobs"]["token_logprobs"]
        if p is not None
    ]
    text = None if params.prompt_logprobs else "".join(c["text"] for c in choices)
    return Answer(request, tokens, Finish(reason) if reason else None, logprobs, text)


def plot(results: list[Result], path: Path) -> None:
    """Resident memory over the requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for result in results:
        slope = next(f.value for f in result.figures if "slope" in f.name)
        label = f"{result.details['label']}: {slope:+.2f} MB per 1,000"
        axes.plot(*zip(*result.details["resident_MB"], strict=True), label=label, linewidth=1)
    axes.set(xlabel="requests ended", ylabel="resident memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--http", action="store_true", help="by HTTP, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    parser.add_argument("--plot", type=Path, default=harness.ROOT / "benchmarks/results/soak.png")
    options = parser.parse_args()
    results = []
    for over_http, host in [(False, False), (False, True), (True, True)][
        : 3 if options.http else 2
    ]:
        results.append(measure(options.requests, over_http, host, options.seed))
        print(harness.table(results[-1]), flush=True)
        for line in results[-1].details["wrong"]:
            print("wrong:", line, flush=True)
    if options.json:
        named = [Result(f"soak: {r.setting}", r.setting, r.figures, r.details) for r in results]
        harness.write_json(options.json, named)
    plot(results, options.plot)


if __name__ == "__main__":
    main()
