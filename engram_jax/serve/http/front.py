"""The outermost layer of the application: request ids, the access log, counts of responses."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engram_jax.serve.http.exchange import Exchange
from engram_jax.serve.http.json_fields import MISTAKE, ApiError
from engram_jax.serve.http.responses import check_framing, error_response

LOG = logging.getLogger(__name__)


class Front:
    """`app`, whose every answer has an X-Request-Id, is counted by status when it ends and has a
    line in the access log. scope["exchange"] is the request's `Exchange`."""

    def __init__(self, app: ASGIApp, *, access_log: bool):
        self.responses: Counter[int] = Counter()  # by how they ended
        self._app, self._access_log = app, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _of(scope)

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [*message.get("headers", ()), exchange.header]
                message = {**message, "headers": headers}
            await send(message)

        try:
            check_framing(scope)
            await self._app(scope, receive, note)
        except ApiError as error:  # of check_framing: the application answers its own
            await error_response(error)(scope, receive, note)
        except Exception:
            LOG.exception("request %s failed", exchange.request_id)
            exchange.ended_as = 500
            if exchange.status is None:
                await error_response(our_mistake(scope))(scope, receive, note)
        finally:
            path = scope.get("raw_path", b"").decode("latin-1")
            self._ended(exchange, scope["client"], scope["method"], path)

    def refused(self, scope: Scope | None, client: Any, status: int) -> tuple[bytes, bytes]:
        """Note an answer that the connection gives, not the application, and return its header.

        scope: of the request that it ends, None = there was no complete head.
        """
        if scope is not None:  # noted when the application has seen that it has ended
            exchange = _of(scope)
            exchange.ended_as = status
        else:
            exchange = Exchange(status=status)
            self._ended(exchange, client)
        return exchange.header

    def _ended(self, exchange: Exchange, client: Any, method: str = "-", path: str = "-") -> None:
        if exchange.outcome is not None:
            self.responses[exchange.outcome] += 1
        if self._access_log:
            LOG.info("%s", exchange.line(client, method, path))


def _of(scope: Scope) -> Exchange:
    if "exchange" not in scope:
        scope["exchange"] = Exchange.of(scope)
    found: Exchange = scope["exchange"]
    return found


def our_mistake(scope: Scope) -> ApiError:
    """What a client is told of an error of ours; the log has the rest under the same id."""
    return ApiError(500, MISTAKE).of_request(_of(scope).request_id)


# What every application behind it answers with.


class Asgi:
    """An endpoint that sends its answer itself: Starlette hands requests to functions only."""

    def __init__(self, call: ASGIApp):
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


async def refused(request: Request, error: ApiError) -> Response:
    """The answer of an `ApiError`."""
    if error.status >= 500:
        error.of_request(request.scope["exchange"].request_id)
    return error_response(error)


async def failed(request: Request, error: Exception) -> Response:
    """The answer of an error of ours; the traceback is in the log only."""
    return error_response(our_mistake(request.scope))
