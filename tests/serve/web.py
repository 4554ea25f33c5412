"""The tiny model behind HTTP, and a client that sees everything a server sends.

python -m tests.serve.web DRAIN_SECONDS    # as a process of its own, on a free port
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import string
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engram_jax.serve.http import server
from engram_jax.serve.http.engine_thread import EngineThread
from engram_jax.serve.http.responses import Limits, Rules
from engram_jax.serve.http.routes import App
from tests.tiny import VOCAB

NAME = "unnamed"  # the tiny model's
EOS = VOCAB - 1
QUEUE = 64
# GPT-2's stand-ins of the bytes c3, a9, a4, bc (é, ä, ü), e2, 82, ac (the euro sign).
PIECES = string.ascii_lowercase + "Ġ" + string.digits + ".,;:!?()'\"-+*/=<" + "Ã©¤¼âĤ¬"


def tokenizer() -> Tokenizer:
    """Byte-level, one token per byte, and `<eos>`: some tokens are parts of characters."""
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(PIECES)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    assert made.get_vocab_size() == VOCAB
    return made


CASES = [
    (prompt, {"max_tokens": tokens, "temperature": temperature, "seed": seed})
    for seed, (prompt, tokens) in enumerate(
        [("abc", 12), ("the €uro", 20), ("x", 40), ("(hello) 123", 16), ("äöü", 5), ("q" * 40, 20)]
    )
    for temperature in (0.0, 1.0)
]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, one line for the user."""
        found = self.json["error"]
        assert list(found) == ["message", "type", "param", "code"]
        assert found["message"] and "\n" not in found["message"] and len(found["message"]) < 400
        assert "Traceback" not in found["message"]
        return found

    @property
    def events(self) -> list[Any]:
        """Of a stream that ended as it must."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Client:
    """headers: of every request that is not given others."""

    headers: Mapping[str, str] = {}

    def __init__(self, port: int):
        self.port = port

    def send(self, method: str, path: str, body: Any = None, headers: Any = None) -> Answer:
        headers = self.headers if headers is None else headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            lowered = {k.lower(): v for k, v in answer.getheaders()}
            return Answer(answer.status, lowered, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def complete(self, prompt: Any = "abc", **fields: Any) -> Answer:
        body = json.dumps({"model": NAME, "prompt": prompt, **fields})
        return self.send("POST", "/v1/completions", body)

    def begin(self, prompt: Any = "abc", **fields: Any) -> socket.socket:
        """Send a request and read nothing."""
        body = json.dumps({"model": NAME, "prompt": prompt, **fields}).encode()
        return self.raw(head(len(body)) + body)

    def raw(self, sent: bytes) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        made.sendall(sent)
        return made

    def stats(self) -> dict[str, float]:
        lines = self.get("/metrics").body.decode().splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def idle(self, seconds: float = 20.0) -> dict[str, float]:
        """Wait until nothing runs or waits; the statistics then."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.stats()
            if not (stats["engram_running"] or stats["engram_waiting"]):
                return stats
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)


def head(length: int) -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What arrives up to `end`: a head and its body may come in several parts."""
    got = b""
    while not got.endswith(end):
        part = connection.recv(65536)
        assert part, got
        got += part
    return got


def read_all(connection: socket.socket) -> bytes:
    got = b""
    while part := connection.recv(65536):
        got += part
    connection.close()
    return got


@contextlib.contextmanager
def served(asgi: Any, limits: Limits) -> Iterator[int]:
    """The port of an application, which a thread serves until the block ends."""
    sock, ready = server.bind("127.0.0.1", 0), threading.Event()
    sock.listen()
    made = server.Server(
        asgi,
        limits.seconds,
        ready.set,
        asgi.refused,
        write_seconds=limits.seconds,
        connections=limits.connections,
    )
    thread = threading.Thread(target=lambda: asyncio.run(made.serve([sock])))
    thread.start()
    try:
        assert ready.wait(30)
        yield sock.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Running(Client):
    """A server in a thread; ends with the block."""

    def __init__(self, engine: Any, limits: Limits | None = None, rules: Rules | None = None):
        self.engine, self.limits = engine, limits or Limits(seconds=1.0, sequences=QUEUE)
        self.rules = rules
        if rules is not None and rules.api_keys:
            self.headers = {"Authorization": f"Bearer {rules.api_keys[0]}"}

    def __enter__(self) -> Running:
        self.runner = EngineThread(self.engine)
        app = App(self.runner, self.engine, self.limits, self.rules)
        self._ending = contextlib.ExitStack()
        self._ending.callback(self.runner.close)
        super().__init__(self._ending.enter_context(served(app.asgi, self.limits)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._ending.close()


if __name__ == "__main__":
    from tests.serve.served import make_engine

    server.serve(
        make_engine(tokenizer=tokenizer(), eos_id=EOS, queue=QUEUE),
        port=0,
        limits=Limits(sequences=QUEUE),
        drain_seconds=float(sys.argv[1]),
    )
    print("ended")
