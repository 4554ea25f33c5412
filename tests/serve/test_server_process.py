"""A server as a process of its own, and how it ends on signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT
from tests.serve.web import Client, read_all

pytestmark = [pytest.mark.slow, pytest.mark.proof]
SEQUENCES = 24
LONG = {"n": SEQUENCES, "max_tokens": 60, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def processes(pytestconfig):
    """Name -> (process, client)."""
    seconds = {"finishes": 30, "interrupted": 30, "too long": 0.1, "twice": 30}
    compiled = str(pytestconfig.cache.mkdir("jax"))
    keep = {
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started: dict[str, subprocess.Popen] = {}

    def start(name: str) -> None:
        started[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.web", str(seconds[name])],
            cwd=ROOT,
            env=os.environ | keep,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def client_of(name: str) -> Client:
        line = started[name].stdout.readline()
        assert line.startswith("serving unnamed at http://127.0.0.1:") and "/v1\n" in line, line
        client = Client(int(line.rsplit(":", 1)[1].removesuffix("/v1\n")))
        assert client.complete(max_tokens=1).status == 200
        return client

    first, *others = seconds
    try:
        start(first)
        clients = {first: client_of(first)}  # what it has compiled serves the others
        for name in others:
            start(name)
        clients |= {name: client_of(name) for name in others}
        yield {name: (started[name], client) for name, client in clients.items()}
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("name", "number"), [("finishes", signal.SIGTERM), ("interrupted", signal.SIGINT)]
)
def test_a_signal_lets_what_runs_finish(processes, name, number):
    process, client = processes[name]
    stream = client.begin(**LONG)
    begun = stream.recv(20)
    process.send_signal(number)
    while (health := client.get("/health")).status == 200:
        pass
    assert health.status == 503 and health.json == {"status": "draining"}
    refused = client.complete()
    assert refused.status == 503 and refused.error["code"] == "draining"
    got = (begun + read_all(stream)).decode()
    assert got.startswith("HTTP/1.1 200") and "data: [DONE]" in got and '"error"' not in got
    assert got.count('"finish_reason":"length"') == SEQUENCES
    out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, "")
    first, *_, last, end = out.splitlines()
    assert first == f"{number.name}: 1 request left, at most 30 s; a second signal ends at once"
    assert re.fullmatch(rf"{number.name}: all are answered, after \d+\.\d s", last)
    assert end == "ended"


def test_what_takes_too_long_is_cancelled(processes):
    process, client = processes["too long"]
    stream = client.begin(**LONG)
    stream.recv(20)
    process.terminate()
    got = read_all(stream).decode()
    error = next(line for line in got.splitlines() if line.startswith('data: {"error"'))
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, "")
    first, *_, last, end = out.splitlines()
    assert first.startswith("SIGTERM: 1 request left, at most 0.1 s; ")
    assert re.fullmatch(r"SIGTERM: 1 request cut off, after \d+\.\d s", last)
    assert end == "ended"


def test_a_second_signal_ends_it_at_once(processes):
    process, client = processes["twice"]
    stream = client.begin(**LONG)
    stream.recv(20)
    process.terminate()
    while client.get("/health").status == 200:
        pass
    process.terminate()
    began = time.monotonic()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - began < 1
