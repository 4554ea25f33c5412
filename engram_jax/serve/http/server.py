"""Runs the HTTP server: binds, serves, and on SIGTERM finishes open requests before it exits.

uvicorn speaks HTTP (uvicorn_internals.py); an orderly end has status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.distributed import processes
from engram_jax.hardware.interrupts import ending_on_sigterm
from engram_jax.serve.http.api_keys import api_keys
from engram_jax.serve.http.engine_thread import EngineThread
from engram_jax.serve.http.responses import Limits, Rules
from engram_jax.serve.http.routes import App, Served
from engram_jax.serve.http.server_log import log_to_stderr
from engram_jax.serve.http.uvicorn_internals import BACKLOG, Server
from engram_jax.serve.open_engine import open_engine

SPARE = 96  # descriptors for connections that come and go, and for what the engine opens later
TELL_EVERY = 5.0  # seconds between two lines while requests end
FEWEST = 8  # connections that are worth serving


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is known before a model is compiled.

    port: 0 = any free one. Raises UserError.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: must be from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host {host!r}, port {port}: {_reason(error)}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _not_bound(host, port, error) from None
    return made


def _not_bound(host: str, port: int, error: Exception) -> UserError:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return UserError(f"port {port} on {host}: is in use; config.serve.port gives another")
    return UserError(f"port {port} on {host}: cannot be served: {_reason(error)}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def connections_of(most: int) -> int:
    """As many connections as the limit of open files (ulimit -n) leaves, at most `most`.

    Raises UserError where it leaves too few.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most
    found = min(most, limit - len(os.listdir("/dev/fd")) - SPARE)
    if found < FEWEST:
        needed = limit - found + FEWEST
        raise UserError(
            f"the limit of open files (ulimit -n) is {limit}: must be at least {needed}"
        )
    return found


def listen(sock: socket.socket, host: str, port: int, most: int) -> int:
    """Let clients connect to what `bind(host, port)` gave; how many may, at most `most`. Raises
    UserError, also if another process was bound to it, too, and came first, and closes it."""
    try:
        connections = connections_of(most)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _not_bound(host, port, error) from None
    except UserError:
        sock.close()
        raise
    return connections


def tell(line: str) -> None:
    print(f"{line}\n", end="", flush=True)  # in one write: other threads have lines, too


def serve(
    engine: Served,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    bound: socket.socket | None = None,
    limits: Limits | None = None,
    rules: Rules | None = None,
    drain_seconds: float = 30.0,
    tell: Callable[[str], None] = tell,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs, for at most `drain_seconds`.

    bound: from `bind(host, port)`. tell: is given a line when requests are answered, and lines
    while the last ones end. A second signal ends the process at once. Main thread only. Raises
    UserError if the port cannot be had.
    """
    limits = limits or Limits()
    sock = bind(host, port) if bound is None else bound
    limits = replace(limits, connections=listen(sock, host, port, limits.connections))
    runner = EngineThread(engine)
    app = App(runner, engine, limits, rules)
    line = f"serving {engine.name} at {url_of(sock)}/v1"
    # A full collection looks at every object, with Python's lock held: JAX's and the model's, which
    # stay, would stop the event loop and the engine for as long as half a second each time.
    gc.collect()
    gc.freeze()
    server = Server(
        app.asgi,
        limits.seconds,
        lambda: tell(line),
        app.asgi.refused,
        write_seconds=limits.seconds,
        connections=limits.connections,
    )
    try:
        asyncio.run(
            until_signal(server, sock, lambda name: _drain(runner, drain_seconds, name, tell))
        )
    finally:
        gc.unfreeze()
        runner.close()
        sock.close()


def serve_checkpoint(config: Config, workdir: Path, step: str, accept: Sequence[str] = ()) -> None:
    """Serve a checkpoint over HTTP until SIGTERM. accept: as in `open_engine`."""
    where = config.serve
    keys = api_keys(where, os.environ)
    bound = bind(where.host, where.port)  # before the model: a port in use is known at once
    try:
        if jax.process_count() > 1:
            raise UserError("--mode=serve: must run as one process; this is one of several")
        with ending_on_sigterm("ended before a request was answered"):
            stage = processes.stages()
            engine = open_engine(config, workdir, step, accept, stage)
            engine.warm_up(stage)
    except BaseException:
        bound.close()
        raise
    most = where.max_answer
    limits = Limits(
        body=where.max_body,
        sequences=where.queue,
        answer=most,
        answers=max(Limits.answers, most),
    )
    rules = Rules(keys, where.cors_origins, where.access_log)
    log_to_stderr(where.log_level)
    try:
        serve(engine, bound=bound, limits=limits, rules=rules, drain_seconds=where.drain_seconds)
    finally:
        engine.close()


async def until_signal(
    server: Server, sock: socket.socket, drain: Callable[[str], Coroutine[Any, Any, None]]
) -> None:
    """Serve until SIGTERM or SIGINT and what `drain` does, given the signal's name; a second signal
    ends the process at once."""
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    async def end(number: int) -> None:
        try:
            await drain(signal.Signals(number).name)
        finally:  # whatever happens, a signal ends the process
            server.should_exit = True

    def on_signal(number: int) -> None:
        if drains:  # the second one: as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        drains.append(loop.create_task(end(number)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await server.serve([sock])


async def _drain(
    runner: EngineThread, seconds: float, name: str, tell: Callable[[str], None]
) -> None:
    """Let the requests that run end, and tell now and then how many are left."""
    began = time.monotonic()

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads the lines: the requests end all the same
            tell(f"{name}: {line}")

    say(f"{_requests(runner.left)} left, at most {seconds:g} s; a second signal ends at once")
    ended = asyncio.ensure_future(asyncio.to_thread(runner.drain, seconds))
    while not (await asyncio.wait([ended], timeout=TELL_EVERY))[0]:
        passed = time.monotonic() - began
        say(f"{_requests(runner.left)} left, {max(seconds - passed, 0):.0f} s left")
    how = "all are answered" if await ended else f"{_requests(runner.cut)} cut off"
    say(f"{how}, after {time.monotonic() - began:.1f} s")


def _requests(count: int) -> str:
    return f"{count} request{'s' * (count != 1)}"


def url_of(sock: socket.socket) -> str:
    """Where a bound socket answers, without a path."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
