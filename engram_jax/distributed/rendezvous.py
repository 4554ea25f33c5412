"""Waits until all processes of a launch are running and agree on it, before JAX connects them.

JAX's own wait for the others is silent, and aborts the process when it times out. So process 0
first listens at the coordinator's address itself, every other process sends it a line of JSON (its
number and what it was started with), and process 0 sends all of them the same answer:

    {"process": 1, "processes": 2, "host": ..., "token": ..., "launch": {...}}    to process 0
    {"waiting": "1 of 3 processes (process 2)"}    from process 0, every few seconds
    {"go": true} or {"error": ...}                from process 0, the last

Then it frees the port for JAX's service.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from engram_jax.config.errors import UserError
from engram_jax.distributed.same_launch import disagreement, named

_PULSE = 1.0  # seconds between two lines of process 0 to the waiting processes
_SILENCE = 30.0  # seconds without one after which process 0 is taken for dead
_FIRST, _NEXT = 5.0, 30.0  # seconds until the first message to the user, and between later ones
_LINGER = 5.0  # seconds in which late processes still get the error
_LINE = 1 << 24  # bytes of the longest line
_BROKEN = (OSError, EOFError, ValueError, TimeoutError)  # what a bad connection may raise


@dataclasses.dataclass(frozen=True)
class Card:
    """What a process says about itself. token: random, distinguishes two with the same number."""

    process: int
    processes: int
    launch: Mapping[str, Any]
    host: str = dataclasses.field(default_factory=socket.gethostname)
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


def meet(
    coordinator: str, process: int, processes: int, launch: Mapping[str, Any], seconds: float
) -> None:
    """Returns when all `processes` have connected to `coordinator` (HOST:PORT) with equal launches.

    launch: from same_launch.describe_launch. Prints to standard error which processes it waits for.
    Raises UserError on every connected process if some do not connect within `seconds`, if two have
    the same number, or if they differ in the number of processes or in their launch.
    """
    host, _, port = coordinator.rpartition(":")
    at = _Place(coordinator, host.strip("[]"), int(port))
    card = Card(process, processes, launch)
    asyncio.run(_Host(at, card, seconds).run() if process == 0 else _ask(at, card, seconds))


@dataclasses.dataclass(frozen=True)
class _Place:
    name: str
    host: str
    port: int


class _Patience:
    """Prints messages about a wait: the first after a few seconds, then at intervals."""

    def __init__(self, seconds: float) -> None:
        self._start = self._now()
        self._next = self._start + min(_FIRST, seconds / 4)
        self.seconds = seconds

    @property
    def left(self) -> float:
        return self._start + self.seconds - self._now()

    def waiting(self, text: str) -> None:
        if self._now() >= self._next:
            self._next = self._now() + _NEXT
            waited = f"{self._now() - self._start:.0f} s of at most {self.seconds:g} s"
            print(f"waiting for {text}: {waited}", file=sys.stderr, flush=True)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class _Host:
    """Process 0's side of the protocol."""

    def __init__(self, at: _Place, card: Card, seconds: float) -> None:
        self._at, self._card = at, card
        self._seconds = seconds
        self._here = {0: card}
        self._came = {card.token}  # including those that have disconnected
        self._expected = card.processes
        self._open: set[asyncio.StreamWriter] = set()
        self._wrong = ""
        self._wake = asyncio.Event()

    async def run(self) -> None:
        server = await self._listen()
        echo = asyncio.create_task(self._find_itself())
        try:
            await self._all()
            self._wrong = self._wrong or disagreement(self._launches())
            server.close()  # the others then look for JAX's service at this port
            await self._tell({"error": self._wrong} if self._wrong else {"go": True})
        finally:
            echo.cancel()
            server.close()
            await asyncio.gather(*map(_closed, self._open))
        if self._wrong:
            raise UserError(self._wrong)

    async def _all(self) -> None:
        """Wait until all are connected, or, after an error, until late processes can get it."""
        patience = _Patience(self._seconds)
        while not self._wrong and (missing := self._missing()):
            text = _of(missing, self._card)
            if patience.left <= 0:
                self._wrong = (
                    f"{text} did not come within {self._seconds:g} s; start every process, each"
                    " with the same command (--join_seconds sets how long to wait)"
                )
                return
            patience.waiting(text)
            await self._tell({"waiting": text})
            await self._news(min(_PULSE, patience.left, self._seconds / 4))
        patience = _Patience(_LINGER)
        while self._wrong and len(self._came) < self._expected and patience.left > 0:
            await self._news(patience.left)

    async def _news(self, seconds: float) -> None:
        """Wait until a process has connected or disconnected since the last call, or `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(seconds, 0))
        self._wake.clear()

    def _launches(self) -> list[Mapping[str, Any]]:
        return [self._here[rank].launch for rank in sorted(self._here)]

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._card.processes) if rank not in self._here]

    async def _listen(self) -> asyncio.Server:
        try:
            return await asyncio.start_server(self._visited, sock=self._socket(), limit=_LINE)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"--coordinator_address={self._at.name}: {error.strerror}"
                ) from error
        # If another process 0 listens at this port, both get the error that there are two.
        with contextlib.suppress(_NoAnswerError):
            await _ask(self._at, self._card, 2.0, patient=False)
        raise UserError(
            f"--coordinator_address={self._at.name}: port {self._at.port} of this host is in use,"
            " by another program or an earlier launch; end that, or give every host another port"
        )

    def _socket(self) -> socket.socket:
        """A socket at the address where JAX's service will listen."""
        given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
        host, _, port = given.rpartition(":")
        address = (host.strip("[]"), int(port) if port.isdecimal() else self._at.port)
        if address[0] in ("", "::") and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", address[1]), family=socket.AF_INET6, dualstack_ipv6=True
            )
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        return socket.create_server(address, family=family)

    async def _find_itself(self) -> None:
        """Connect to the coordinator's address: if another process 0 answers, both get an error."""
        try:
            await _ask(self._at, self._card, self._seconds, patient=False)
        except UserError as error:
            if not isinstance(error, _NoAnswerError):
                self._complain(str(error))

    async def _visited(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        card = None
        try:
            card = Card(**json.loads(await asyncio.wait_for(reader.readline(), _SILENCE)))
            self._open.add(writer)
            if card.token != self._card.token:
                self._admit(card)
            self._wake.set()
            await reader.read()  # until it disconnects
        except (*_BROKEN, TypeError):
            pass  # another program, or a process that has died
        finally:
            self._open.discard(writer)
            writer.close()
            if card is not None and self._here.get(card.process) is card:
                del self._here[card.process]
                self._wake.set()

    def _admit(self, card: Card) -> None:
        self._came.add(card.token)
        self._expected = max(self._expected, card.processes)
        other = self._here.setdefault(card.process, card)
        if card.processes != self._card.processes:
            self._complain(
                f"--num_processes: {self._card.processes} on process 0 (host {self._card.host}),"
                f" {card.processes} on process {card.process} (host {card.host}); give every host"
                " the same"
            )
        elif other is not card:
            self._complain(
                f"--process_id={card.process}: given to two processes, on host {other.host} and on"
                f" host {card.host}; give each its own, from 0 to {card.processes - 1}"
            )

    def _complain(self, text: str) -> None:
        self._wrong = self._wrong or text
        self._wake.set()

    async def _tell(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for writer in list(self._open):
            writer.write(line)
        for writer in list(self._open):
            with contextlib.suppress(*_BROKEN):
                await asyncio.wait_for(writer.drain(), _PULSE)


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection after sending what was written to it."""
    writer.close()
    with contextlib.suppress(*_BROKEN):
        await asyncio.wait_for(writer.wait_closed(), _PULSE)


class _NoAnswerError(UserError):
    """Process 0 did not answer."""


async def _ask(at: _Place, card: Card, seconds: float, *, patient: bool = True) -> None:
    """The other processes' side: returns when process 0 sends "go".

    Raises UserError with the error it sends; _NoAnswerError if it does not answer for `seconds`.
    """
    patience = _Patience(seconds)
    reason = ""
    while patience.left > 0:
        try:
            async with asyncio.timeout(min(max(patience.left, 0.1), 10)):
                reader, writer = await asyncio.open_connection(at.host, at.port, limit=_LINE)
        except _BROKEN as error:
            reason = _reason(error)
        else:
            try:
                await _heard(reader, writer, card, patience, tell=patient)
                return await _listening(at) if patient else None
            except _BROKEN as error:
                if isinstance(error, UserError):
                    raise
                reason = "another program, or an earlier launch, answers there"
                if isinstance(error, OSError):
                    reason = _reason(error)
            finally:
                writer.close()
        if patient:
            patience.waiting(f"process 0 at {at.name} ({reason})")
        await asyncio.sleep(min(0.2, seconds / 20))
    raise _NoAnswerError(
        f"process 0 did not answer at {at.name} within {seconds:g} s ({reason}); start every"
        " process, each with the same command (--join_seconds sets how long to wait)"
    )


async def _listening(at: _Place) -> None:
    """Wait up to a second for JAX's service: its client, once refused, pauses for a second."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PULSE):
            while True:
                with contextlib.suppress(OSError):
                    await _closed((await asyncio.open_connection(at.host, at.port))[1])
                    return
                await asyncio.sleep(0.02)


async def _heard(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    card: Card,
    patience: _Patience,
    *,
    tell: bool,
) -> None:
    writer.write(json.dumps(dataclasses.asdict(card)).encode() + b"\n")
    await writer.drain()
    while True:
        silence = min(_SILENCE, max(patience.left, 3 * _PULSE))
        line = await asyncio.wait_for(reader.readline(), silence)
        if not line:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        message = json.loads(line)
        if "error" in message:
            raise UserError(message["error"])
        if "go" in message:
            return
        if tell:
            patience.waiting(message["waiting"])


def _of(ranks: list[int], card: Card) -> str:
    return f"{len(ranks)} of {card.processes} processes ({named(ranks)})"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        # asyncio puts the address into the text of a refused connection
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or "no answer"
