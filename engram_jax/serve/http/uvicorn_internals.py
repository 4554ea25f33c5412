"""uvicorn's server, with a timeout for request headers and with errors in OpenAI's form.

The one file with private use of uvicorn: its HTTP protocol class and the attributes of a connection
(`h11_impl.H11Protocol`: `conn`, `cycle`, `transport`), and the two methods of `uvicorn.Server` that
are replaced. None of it is promised to the next release: pyproject.toml bounds uvicorn below the
next minor one. h11 is the protocol under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from engram_jax.serve.http.json_fields import ApiError

WRITE_SECONDS = 5  # at the end, for clients that do not read their answer


class Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: they end the process by the signal's status.

    head_seconds: in which the head of a request must arrive. ready: called when requests are
    answered.
    """

    def __init__(self, app: ASGIApp, head_seconds: float, ready: Callable[[], None] = lambda: None):
        config = uvicorn.Config(
            app,
            http=partial(_Connection, head_seconds=head_seconds),  # type: ignore[arg-type]
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=WRITE_SECONDS,
        )
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Connection(H11Protocol):
    """A connection whose request must have its head complete in time."""

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._seconds = head_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._seconds, self._too_late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self.conn.trailing_data[0]:  # a part of a head
            self._refuse(408, f"head: must arrive within {self._seconds:g} s")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not an HTTP/1.1 request, or one with a head of more than 64 KiB")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(ApiError(status, message).body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (
                h11.Response(status_code=status, headers=headers, reason=""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
