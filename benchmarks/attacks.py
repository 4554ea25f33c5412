"""What a stream and /health notice of clients that misbehave.

    python -m benchmarks.attacks [--only NAME ...] [--rounds N] [--seconds S] [--json PATH]

A server of the tests' tiny model is a process of its own, an attack another. In turns nothing
happens (or, where an attack makes the engine work, the same work is asked for in an ordinary way)
and an attack runs; meanwhile one client streams, request after request, and another asks
for /health ten times a second. The figures: how many times as long a token of the stream takes
under the attack as in the turn before it (a turn's seconds by the tokens that came in it; median
over the rounds), and the slowest /health of all rounds. A client that was refused tries again
after a second: what a flood of requests costs is not asked here.
On a machine that does other work, too, the slowest one without an attack says what that adds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figure, Result

CAPACITY, QUEUE, SEQUENCES = 1024, 256, 8
FEW_FILES = 300  # the limit of open files that `silent, few files` runs with
ID = [1]


def post(**fields: Any) -> bytes:
    body = json.dumps({"model": "unnamed", "prompt": ID, **fields}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
LARGE = {"echo": True, "logprobs": 20, "ignore_eos": True}
STOPS = ["a" * 999 + "b", *(f"{chr(98 + i)}{'a' * 900}c" for i in range(15))]
SHORT = LARGE | {"logprobs": 0}  # the model computes the same, the answer lists a 20th of it
# name -> (connections at once, what each sends, whether it reads the answer)
ATTACKS: dict[str, tuple[int, bytes, bool]] = {
    "silent connections": (1000, b"", False),
    "silent, few files": (1000, b"", False),
    "heads without bodies": (1000, HEAD, False),
    "bodies that stop": (200, HEAD + b" " * 900_000, False),
    "answers never read": (30, post(prompt=ID * 900, n=2, max_tokens=20, **LARGE), False),
    "answers of 144 MB": (4, post(prompt=ID * 1000, n=250, max_tokens=20, **LARGE), True),
    "the largest answers": (2, post(prompt=ID * 1000, n=40, max_tokens=20, **LARGE), True),
    "prompts of a megabyte": (40, post(prompt="a" * 1_000_000), True),
    "a megabyte of small prompts": (40, post(prompt=["a" * 4000] * 200), True),
    "stop strings": (4, post(prompt="a", stop=STOPS, max_tokens=1000, ignore_eos=True), True),
    "many sequences": (1, post(n=200, max_tokens=60, ignore_eos=True), True),
}
# What an attack is compared with, where it makes the engine work: the same work, asked for in
# another way. Others: with nothing.
INSTEAD: dict[str, tuple[int, bytes, bool]] = {
    "answers never read": (30, post(prompt=ID * 900, n=2, max_tokens=20, **LARGE), True),
    "the largest answers": (2, post(prompt=ID * 1000, n=40, max_tokens=20, **SHORT), True),
    "stop strings": (4, post(prompt="a", max_tokens=1000, ignore_eos=True), True),
    "many sequences": (14, post(n=1, max_tokens=60, ignore_eos=True), True),  # no slot is ever free
}


def serve() -> None:
    """The server's process; prints its line when it answers."""
    from engram_jax.serve.http import server
    from engram_jax.serve.http.responses import Limits
    from tests.serve.served import make_engine
    from tests.serve.web import EOS, tokenizer

    engine = make_engine(
        tokenizer=tokenizer(),
        eos_id=EOS,
        capacity=CAPACITY,
        page=64,
        prefill_chunk=64,
        sequences=SEQUENCES,
        queue=QUEUE,
    )
    engine.warm_up()
    server.serve(engine, port=0, limits=Limits(sequences=QUEUE), drain_seconds=0.1)


def attack(name: str, port: int, instead: bool) -> None:
    """The attacker's process: until it is ended. instead: of what the attack is compared with."""
    count, sent, reads = (INSTEAD if instead else ATTACKS)[name]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def one() -> None:
        """Again and again; after a second where it was refused."""
        while True:
            refused = True
            with contextlib.suppress(OSError), socket.socket() as made:
                if not reads:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                made.connect(("127.0.0.1", port))
                made.sendall(sent)
                refused = not reads
                while reads and (got := made.recv(1 << 16)):
                    refused |= got.startswith(b"HTTP/1.1 4")
                while not reads and made.recv(1, socket.MSG_PEEK):  # until the server ends it
                    time.sleep(0.5)
            time.sleep(1 if refused else 0.01)

    threading.stack_size(1 << 18)
    for _ in range(count):
        threading.Thread(target=one, daemon=True).start()
    time.sleep(3600)


class Watch:
    """A client that streams and one that asks for health, on threads, until closed."""

    def __init__(self, port: int):
        self.port = port
        self.tokens: list[float] = []  # when each came
        self.health: list[tuple[float, float]] = []  # when it was asked, seconds until the answer
        self.refused = 0
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=f) for f in (self._stream, self._ask)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _stream(self) -> None:
        fields = {"model": "unnamed", "prompt": ID, "max_tokens": 200, "ignore_eos": True}
        while not self._ends.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                body = json.dumps(fields | {"stream": True, "logprobs": 0})
                made.request("POST", "/v1/completions", body)
                answer = made.getresponse()
                self.refused += answer.status != 200
                while (line := answer.readline()) and not self._ends.is_set():
                    if line.startswith(b"data: {"):
                        self.tokens.append(time.perf_counter())
                made.close()

    def _ask(self) -> None:
        while not self._ends.is_set():
            began = time.perf_counter()
            took = 30.0
            with contextlib.suppress(OSError, http.client.HTTPException):
                made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                made.request("GET", "/health")
                if made.getresponse().status == 200:
                    took = time.perf_counter() - began
                made.close()
            self.health.append((began, took))
            time.sleep(0.1)

    def between(self, began: float, ended: float) -> tuple[float, float]:
        """(seconds for each of the stream's tokens, the slowest /health in seconds)."""
        tokens = sum(began <= t < ended for t in self.tokens)
        health = [took for asked, took in self.health if began <= asked < ended]
        return (ended - began) / max(1, tokens), max(health, default=30.0)


@contextlib.contextmanager
def process(*arguments: str, files: int | None = None) -> Iterator[subprocess.Popen[str]]:
    def limit() -> None:
        if "--attack" in arguments:  # it comes from another machine: it takes no core of the server
            os.nice(10)
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-m", "benchmarks.attacks", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    made = subprocess.Popen(
        command,
        cwd=harness.ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
    )
    try:
        yield made
    finally:
        made.kill()
        made.wait()


def measure_one(name: str, rounds: int, seconds: float) -> list[Figure]:
    files = FEW_FILES if "few files" in name else None
    with process("--serve", files=files) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(line.rsplit(":", 1)[1].split("/")[0])
        watch = Watch(port)
        time.sleep(2)
        calm: list[tuple[float, float]] = []
        under: list[tuple[float, float]] = []
        for _ in range(rounds):
            for turns, more in ((calm, ["--instead"]), (under, [])):
                with contextlib.ExitStack() as running:
                    if turns is under or name in INSTEAD:
                        asked = ("--attack", name, "--port", str(port), *more)
                        running.enter_context(process(*asked))
                        time.sleep(1)  # it starts
                    began = time.perf_counter()
                    time.sleep(seconds)
                    turns.append((began, time.perf_counter()))
                time.sleep(2)
        watch.close()
        server.kill()
        log = server.communicate()[1]
    quiet, loud = ([watch.between(*turn) for turn in turns] for turns in (calm, under))
    slower = statistics.median(b[0] / a[0] for a, b in zip(quiet, loud, strict=True))
    worst, base = max(b[1] for b in loud), max(a[1] for a in quiet)
    note = f"{1000 * base:.0f} ms without; {len(log.splitlines())} lines of log"
    takes = Figure(
        f"{name}: tokens of a stream take",
        slower,
        "times as long",
        at_most=1.2,
        note=f"{watch.refused} of its requests were refused",
    )
    return [
        takes,
        Figure(f"{name}: slowest /health", 1000 * worst, "ms", at_most=250, note=note),
    ]


def measure(names: list[str], rounds: int, seconds: float) -> Result:
    figures: list[Figure] = []
    for name in names:
        figures += measure_one(name, rounds, seconds)
        print(*figures[-2:], sep="\n", flush=True)
    return Result("attacks", f"{rounds} rounds of {seconds:g} s", figures)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there, too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--instead", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    elif options.attack:
        attack(options.attack, options.port, options.instead)
    else:
        result = measure(options.only, options.rounds, options.seconds)
        print(harness.table(result), flush=True)
        if options.json:
            harness.write_json(options.json, [result])


if __name__ == "__main__":
    main()
