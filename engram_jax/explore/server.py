"""Opens a run's checkpoint and serves the page until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax

from engram_jax.checkpoint.load_model import load_model
from engram_jax.config import Config, ServeConfig
from engram_jax.config.errors import UserError, one_of
from engram_jax.config.serving_schema import HIDDEN
from engram_jax.distributed import processes
from engram_jax.explore.app import App
from engram_jax.explore.explorer import Explorer, check_explores, padded_lengths
from engram_jax.explore.training_text import TrainingText, count_training_text
from engram_jax.hardware.interrupts import ending_on_sigterm
from engram_jax.model.program import check_decodes
from engram_jax.serve.compatibility import with_capacity
from engram_jax.serve.http.api_keys import VARIABLE
from engram_jax.serve.http.responses import Limits
from engram_jax.serve.http.server import bind, listen, tell, until_signal, url_of
from engram_jax.serve.http.server_log import log_to_stderr
from engram_jax.serve.http.uvicorn_internals import Server
from engram_jax.serve.open_engine import stored_rows

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def explore_checkpoint(
    config: Config, workdir: Path, step: str, tokens: int, accept: Sequence[str] = ()
) -> None:
    """Serve the page of a run's checkpoint. tokens: of its training text that are counted, while
    the page is open. accept: keys or sections of `config` that may differ from what it was trained
    with. Raises UserError for a model that it cannot show."""
    where = config.serve
    check_explores(config)
    check_decodes(config)
    if key := stored_rows(where):
        raise UserError(f"{key}: --mode=explore has the tables on the device; leave it out")
    check_no_keys(where, os.environ)
    bound = bind(where.host, where.port)  # before the model: a port in use is known at once
    try:
        if jax.process_count() > 1:
            raise UserError("--mode=explore: must run as one process; this is one of several")
        with ending_on_sigterm("ended before a text was explored"):
            stage = processes.stages()
            trained = load_model(config, workdir, step, accept=accept, tell=stage)
            own = with_capacity(trained, where, processes.warn)
            given = config, workdir, trained, tokens, accept, stage
            text = TrainingText(partial(count_training_text, *given), stage)
            explorer = Explorer(trained, own, text)
            stage("compiling for short texts")
            explorer.compiled(padded_lengths(explorer.capacity)[0])
    except BaseException:
        bound.close()
        raise
    log_to_stderr(where.log_level)
    serve_page(explorer, text, bound, config, tell)


def check_no_keys(serve: ServeConfig, environment: Mapping[str, str]) -> None:
    """Raises UserError for API keys, which the page has none of to send; for those that a run's own
    configuration had, which are not recorded, only if other machines could reach it."""
    given = {
        "config.serve.api_key": any(key != HIDDEN for key in serve.api_key),
        "config.serve.api_key_file": bool(serve.api_key_file),
        f"${VARIABLE}": VARIABLE in environment,
    }
    for name, there in given.items():
        if there:
            raise UserError(f"{name}: --mode=explore has a page that sends no key; leave it out")
    if serve.api_key and serve.host not in LOOPBACK:
        raise UserError(
            f"config.serve.host = {serve.host!r}: this configuration had API keys, and"
            f" --mode=explore asks for none: must be {one_of(LOOPBACK)}"
        )


def serve_page(
    explorer: Explorer,
    text: TrainingText,
    bound: socket.socket,
    config: Config,
    tell: Callable[[str], None],
) -> None:
    """Until SIGTERM or SIGINT. bound: of config.serve's host and port. tell: is given a line when
    requests are answered. Main thread only."""
    where = config.serve
    connections = listen(bound, where.host, where.port, Limits.connections)
    limits = Limits(body=where.max_body, connections=connections)
    app = App(explorer, where.host, limits, access_log=where.access_log)
    ending = threading.Event()

    def compile_others() -> None:
        for length in padded_lengths(explorer.capacity)[1:]:
            if not ending.is_set():
                explorer.compiled(length)

    compiling = threading.Thread(target=compile_others, name="compile")
    server = Server(
        app.asgi,
        limits.seconds,
        lambda: tell(f"exploring {explorer.name} at {url_of(bound)}/"),
        app.asgi.refused,
        write_seconds=limits.seconds,
        connections=limits.connections,
    )

    async def end(name: str) -> None:
        tell(f"{name}: ends")

    compiling.start()
    text.start()
    try:
        asyncio.run(until_signal(server, bound, end))
    finally:
        ending.set()
        app.close()
        compiling.join()  # the compiler cannot be stopped, and must not outlive the interpreter
        bound.close()
