"""The page and its one JSON route as an ASGI application, inside the bounds of the server's."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engram_jax.config.errors import UserError
from engram_jax.explore.explorer import Explorer
from engram_jax.serve.http.arriving import Arriving
from engram_jax.serve.http.bounds import check_prompt_sizes
from engram_jax.serve.http.front import Asgi, Front, failed, refused
from engram_jax.serve.http.json_fields import ApiError, parse_json, shown
from engram_jax.serve.http.responses import (
    DisconnectedError,
    Limits,
    dumps,
    error_response,
    read_body,
    while_connected,
)

ROUTE = "/explore"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/draw.js": ("draw.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for"
    " 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^\s:/?#@\[\]]+))(?::\d*)?")  # [address], name or address
WAITING = 32  # texts that wait for an answer; one is computed at a time


class App:
    """asgi: the application. host: a name that requests may be for, besides localhost."""

    def __init__(self, explorer: Explorer, host: str, limits: Limits, *, access_log: bool = True):
        self._explorer, self._limits = explorer, limits
        self._arriving, self._waiting = Arriving(limits.bodies), 0
        self._thread = ThreadPoolExecutor(1, "explore")
        routes = [Route(path, self._file) for path in FILES]
        routes.append(Route(ROUTE, Asgi(self._explore), methods=["POST"]))
        handlers: Any = {ApiError: refused, HTTPException: _no_route, Exception: failed}
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        starlette.router.redirect_slashes = False
        folder = resources.files(__package__)
        self._files = {path: (folder / name).read_bytes() for path, (name, _) in FILES.items()}
        self.asgi = Front(_HostCheck(starlette, host), access_log=access_log)

    def close(self) -> None:
        """Wait for what is being computed; nothing that waits is begun."""
        self._thread.shutdown(cancel_futures=True)

    async def _file(self, request: Request) -> Response:
        kind = FILES[request.url.path][1]
        return Response(self._files[request.url.path], headers=HEADERS, media_type=kind)

    async def _explore(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send unasked
            raise ApiError(415, f"Content-Type = {shown(kind)}: must be application/json")
        try:
            body = await read_body(scope, receive, self._limits, self._arriving)
            await while_connected(receive, self._answer(body, scope, receive, send))
        except DisconnectedError:  # the page has asked again
            scope["exchange"].gone()

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        if self._waiting >= WAITING:
            wait = {"Retry-After": str(self._limits.retry_after)}
            message = f"{self._waiting} texts wait for an answer; try again later"
            raise ApiError(429, message, code="queue_full", headers=wait)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._found, body)
        finally:
            self._waiting -= 1
        await Response(found, headers=HEADERS, media_type="application/json")(scope, receive, send)

    def _found(self, body: bytes) -> bytes:
        fields = parse_json(body)
        for name in fields.names:
            if name not in ("prompt", "at"):
                raise ApiError(400, f"{shown(name)}: is no known field; there are prompt and at")
        check_prompt_sizes(fields, self._explorer.capacity)
        prompt = fields.text("prompt", fields.get("prompt"), "a text")
        at = fields.integer("at", None, 0, self._explorer.capacity - 1)
        try:
            return dumps(self._explorer.look(prompt, at))
        except UserError as error:
            raise ApiError(400, str(error)) from None


class _HostCheck:
    """Answers only requests for an address, localhost or `host`: a site whose name is made to lead
    here (DNS rebinding) would otherwise be a page of this server to a browser."""

    def __init__(self, app: ASGIApp, host: str):
        self._app, self._names = app, {"localhost", host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).getlist("host")
        if len(given) == 1 and self._is_mine(given[0]):
            await self._app(scope, receive, send)
            return
        names = " or ".join(sorted(self._names))
        message = f"Host = {shown(', '.join(given))}: must be an address, {names}"
        await error_response(ApiError(403, message, code="host"))(scope, receive, send)

    def _is_mine(self, host: str) -> bool:
        if (parts := _HOST.fullmatch(host.lower())) is None:
            return False
        try:
            return parts[2] in self._names or bool(ipaddress.ip_address(parts[1] or parts[2]))
        except ValueError:
            return False


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {shown(request.url.path)[1:-1]}"
    allowed = (error.headers or {}).get("Allow", "")
    message = f"{what}: must be {allowed}" if allowed else f"{what}: no such route; there is GET /"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
