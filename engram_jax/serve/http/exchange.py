"""What is noted of a request while it is answered, and the line of the access log.

No line has text of a prompt or an answer, and none can be forged: what a client sends is shown
within bounds, without control characters.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from engram_jax.serve.http.completion_request import CompletionRequest

_ID = re.compile(rb"[!-~]{1,128}")
GONE = 499  # nginx's status for a client that went away: counted, not sent
_SHOWN = 200  # characters of a path
_UNSEEN = re.compile(r"[^\x21-\x7e]")


@dataclass
class Exchange:
    """A request and its answer.

    request_id: the client's X-Request-Id if it can be one, else made. named: it is the client's.
    began: `time.monotonic()` of its head. status: that was sent. ended_as: where that does not say
    how the answer ended. finishes: of its sequences, with how many.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    named: bool = False
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    ended_as: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finishes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        if len(given) == 1 and _ID.fullmatch(given[0]):
            return cls(given[0].decode(), named=True)
        return cls()

    def takes(self, request: CompletionRequest) -> None:
        """What the request's body says; its id, if the head has none."""
        self.prompt_tokens = request.prompt_tokens
        if request.request_id and not self.named:
            self.request_id = request.request_id

    def gone(self) -> None:
        """The client has gone, or was answered by the connection itself."""
        if self.ended_as is None:
            self.ended_as = GONE

    @property
    def outcome(self) -> int | None:
        """The status it counts as; None: there was no answer."""
        return self.status if self.ended_as is None else self.ended_as

    @property
    def header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.request_id.encode()

    def line(self, client: Any, method: str = "-", path: str = "-") -> str:
        """The access log's line. client: (host, port), or None. path: as it was sent, without its
        query, which may have secrets."""
        where = "-" if not client else f"{client[0]}:{client[1]}"
        ends = ",".join(f"{name}:{count}" for name, count in self.finishes.items())
        parts = {
            "client": where,
            "method": _printable(method),
            "path": _printable(path),
            "status": "-" if self.outcome is None else self.outcome,
            "seconds": f"{time.monotonic() - self.began:.3f}",
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish": ends or "-",
            "request_id": self.request_id,
        }
        return " ".join(f"{key}={value}" for key, value in parts.items())


def _printable(text: str) -> str:
    """Without spaces and control characters, and not longer than a line can be."""
    cut = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return _UNSEEN.sub(lambda found: f"%{ord(found[0]):02X}", cut)
