"""uvicorn's server, with limits on what a connection may hold and errors in OpenAI's form.

The one file with private use of uvicorn: its HTTP protocol class and the attributes of a
connection (`h11_impl.H11Protocol`: `conn`, `cycle`, `transport`, `connections`), and the three
methods of `uvicorn.Server` that are replaced. None of it is promised to the next release:
pyproject.toml bounds uvicorn below the next minor one. h11 is the protocol under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from engram_jax.serve.http.json_fields import ApiError

END_SECONDS = 5  # at the end, for clients that do not read their answer
SEND_BUFFER = 1 << 17  # bytes that the system keeps of an answer until the client takes them
BACKLOG = 1024  # connections that the system keeps until they are accepted
DEFERRED = getattr(socket, "TCP_DEFER_ACCEPT", None)  # Linux
SILENT = 5  # seconds that the system keeps a connection on which nothing has been sent, about
CROWDED = "too many connections; this one waited longest for a request"
ACCEPTED = 16  # at a time; each holds a descriptor before anything can be closed for it
PROBE_EVERY = 5.0  # seconds; PROBE_ANSWER: in which a client that has gone answers one
PROBE_ANSWER = 0.1
DISCARDED = 1 << 23  # bytes of a body that comes behind its answer (a refusal), and is not used
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LOG = logging.getLogger(__name__)
LINE_EVERY = 60.0  # seconds between two lines about connections that cannot be accepted


Refused = Callable[[Any, Any, int], tuple[bytes, bytes]]
"""Told of an answer that a connection gives itself: the scope of the request that it ends, or None;
the client, the status. Returns a header for it."""


@dataclass
class Bounds:
    """Of all connections together.

    head_seconds: in which the head of a request must arrive. write_seconds: in which a client must
    take some of what waits for it. most: connections at once; one more than that, and the one that
    has waited longest for a request (or the rest of one) is closed, with an answer if a part came.
    waiting: connections without a complete request, the one that has waited longest first.
    """

    head_seconds: float
    refused: Refused
    write_seconds: float = 20.0
    most: int = 2048
    waiting: dict[_Connection, None] = field(default_factory=dict)


class Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: they end the process by the signal's status.

    ready: called when requests are answered. refused: see `Refused`. The others: see `Bounds`.
    """

    def __init__(
        self,
        app: ASGIApp,
        head_seconds: float,
        ready: Callable[[], None],
        refused: Refused,
        *,
        write_seconds: float = Bounds.write_seconds,
        connections: int = Bounds.most,
    ):
        bounds = Bounds(head_seconds, refused, write_seconds, connections)
        config = uvicorn.Config(
            app,
            http=partial(_Connection, bounds=bounds),  # type: ignore[arg-type]
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=ACCEPTED,
            timeout_graceful_shutdown=END_SECONDS,
        )
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_Handler())
        await super().startup(sockets)
        for sock in sockets or ():  # asyncio has set it to what it accepts at a time
            sock.listen(BACKLOG)
            if DEFERRED is not None:  # one that is silent costs no descriptor, and no time here
                sock.setsockopt(socket.IPPROTO_TCP, DEFERRED, SILENT)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            connection.end_closing(now)  # type: ignore[union-attr]
        return await super().on_tick(counter)


class _Handler:
    """Of the event loop's errors: a line a minute where asyncio logs a traceback for each of the
    connections that it could not accept."""

    def __init__(self) -> None:
        self._told = -LINE_EVERY

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NO_DESCRIPTORS):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._told >= LINE_EVERY:
            self._told = time.monotonic()
            LOG.error(
                "connections cannot be accepted for now: %s (ulimit -n is the limit of open files)",
                error.strerror,
            )


class _Connection(H11Protocol):
    """A connection whose client sends and reads in time, or loses it."""

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._closing_since: float | None = None
        self._discarded = 0
        self._unwanted = False  # there are too many, and all others are at work
        self._only_reads = False  # the client has closed its side, behind a complete request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:  # else it grows to megabytes for a client that does not read
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._watch()
        if len(self.connections) > self._bounds.most:
            oldest = next(iter(self._bounds.waiting), self)
            # The newest, where all others are at work, is told why when its request is there: a
            # connection that is closed with something unread in it is reset, and the answer lost.
            self._unwanted = oldest is self
            if oldest is not self:
                oldest._end(503, CROWDED)

    def data_received(self, data: bytes) -> None:
        if self._unwanted:
            self._refuse(503, CROWDED)
            return
        late = self.conn.our_state is h11.DONE  # the request is answered, and its body still comes
        self._discarded = self._discarded + len(data) if late else 0
        if self._discarded > DISCARDED:
            self.transport.abort()
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        if self._only_reads:
            self.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._bounds.waiting.pop(self, None)
        for timer in (self._head_timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._probe_timer = None

    # A request, or the rest of one, must come.

    @property
    def _answering(self) -> bool:
        """Whether a request's head has come that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        closing = self.transport.is_closing()
        if closing or (self._answering and not self.cycle.more_body):
            self._bounds.waiting.pop(self, None)
        else:
            self._bounds.waiting.setdefault(self)
        if closing or self._answering:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._bounds.head_seconds, self._too_late)

    def _too_late(self) -> None:
        self._end(408, f"head: must arrive within {self._bounds.head_seconds:g} s")

    def _end(self, status: int, message: str) -> None:
        """Refuse the request that has begun to come; a connection without one is only closed."""
        if self._answering or self.conn.trailing_data[0]:
            self._refuse(status, message)
        else:
            self.transport.close()
            self._watch()

    # The answer must be taken.

    def pause_writing(self) -> None:
        """More waits to be sent than the transport's limit, until `resume_writing`."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._bounds.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def end_closing(self, now: float) -> None:
        """What was closed is gone after `write_seconds`, even if its client does not read."""
        if not self.transport.is_closing():
            return
        if self._closing_since is None:
            self._closing_since = now
        elif now - self._closing_since >= self._bounds.write_seconds:
            self.transport.abort()

    # The client has closed its side of the connection: it only reads, or it has gone.

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: until all that was asked has been answered."""
        if self._answering and not self.cycle.more_body:
            if not self._only_reads:
                self._only_reads = True
                self._probe()
            return True
        if self._answering or self.conn.trailing_data[0]:
            self._refuse(400, "the request ends before its head and body are complete")
        else:
            self.transport.close()
        return True  # it is closing, once this is sent

    def _probe(self) -> None:
        """Write what a client reads over. One that has gone answers it with a reset."""
        waits = self._answering and not self.cycle.response_started
        if waits and self.scope["http_version"] == "1.1" and not self.transport.is_closing():
            go_on = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(go_on) or b"")
        self._probe_timer = self.loop.call_later(PROBE_ANSWER, self._after_probe)

    def _after_probe(self) -> None:
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._probe_timer = self.loop.call_later(PROBE_EVERY, self._probe)

    # Errors

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not an HTTP/1.1 request, or one with a head of more than 64 KiB")

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun
            scope = self.cycle.scope if self._answering else None
            header = self._bounds.refused(scope, self.client, status)
            body = json.dumps(ApiError(status, message).body).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                header,
            ]
            events = (
                h11.Response(status_code=status, headers=headers, reason=""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
        self._watch()
        if self._answering:  # whoever reads its body or answers it is done
            self.cycle.disconnected = True
            self.cycle.message_event.set()
