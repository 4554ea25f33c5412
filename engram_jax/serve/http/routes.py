"""The engine over HTTP: OpenAI's completions route, models, health and metrics.

Whatever a client sends is answered in OpenAI's shape; one that goes away has its requests
cancelled. docs/serving.md describes fields, limits and errors for users.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engram_jax import __version__
from engram_jax.config.errors import UserError
from engram_jax.serve.http import completion_request
from engram_jax.serve.http.api_keys import KeyCheck
from engram_jax.serve.http.arriving import Arriving
from engram_jax.serve.http.bounds import check_answer_size, check_body, check_prompt_sizes
from engram_jax.serve.http.completion_response import Answer
from engram_jax.serve.http.cross_origin import cross_origin
from engram_jax.serve.http.encode import SMALL, Encoder, pieces
from engram_jax.serve.http.engine_thread import FAILED, ClosedError, EngineThread, Group, Steps
from engram_jax.serve.http.exchange import Exchange
from engram_jax.serve.http.front import Asgi, Front, failed, refused
from engram_jax.serve.http.json_fields import ApiError, Fields, parse_json, shown
from engram_jax.serve.http.metrics import Metrics, Timing
from engram_jax.serve.http.responses import (
    DisconnectedError,
    Limits,
    Rules,
    error_response,
    json_response,
    read_body,
    while_connected,
)
from engram_jax.serve.http.streaming import UNREADABLE, stream, until_all_end
from engram_jax.serve.http.tokenize_routes import detokenize, tokenize
from engram_jax.serve.request import Delta, QueueFullError

LOG = logging.getLogger(__name__)
ROUTES = (
    "POST /v1/completions, /tokenize and /detokenize, GET /v1/models, /health, /version and"
    " /metrics"
)
NO_CHAT = "base models have no chat template; use POST /v1/completions"
QUICK = 1 << 14  # bytes of a body that is parsed before larger ones
JSON = [(b"content-type", b"application/json")]


T = TypeVar("T")


class Served(Steps, Protocol):
    """What is needed of the engine (serve/engine.py), constants of it among them."""

    name: str
    capacity: int
    tokenizer: Any
    eos_id: int | None

    @property
    def memory_error(self) -> str: ...


class App:
    """The routes of one engine. `asgi` is the application."""

    def __init__(
        self, runner: EngineThread, engine: Served, limits: Limits, rules: Rules | None = None
    ):
        rules = rules or Rules()
        self._runner, self._limits, self._engine = runner, limits, engine
        self._name, self._capacity = engine.name, engine.capacity
        self._tokenizer, self._eos = engine.tokenizer, engine.eos_id
        self._created = int(time.time())
        self._times = Metrics()
        self._active = self._numbers = 0  # requests under way; numbers that their answers list
        self._arriving, self._encoder = Arriving(limits.bodies), Encoder()
        # Tokenizing takes a core for as long as it takes: no more than one, and small bodies do not
        # wait for large ones.
        self._quick, self._slow = ThreadPoolExecutor(1, "parse"), ThreadPoolExecutor(1, "parse")
        routes = [
            Route("/v1/completions", Asgi(self._completions), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/tokenize", Asgi(self._from_json(tokenize)), methods=["POST"]),
            Route("/detokenize", Asgi(self._from_json(detokenize)), methods=["POST"]),
            Route("/version", self._version),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers: Any = {ApiError: refused, HTTPException: _no_route, Exception: failed}
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        starlette.router.redirect_slashes = False
        app: ASGIApp = starlette
        if rules.api_keys:
            app = KeyCheck(app, rules.api_keys)
        if rules.cors_origins:  # around the check: browsers send no key with a preflight
            app = cross_origin(app, rules.cors_origins)
        self.asgi = Front(app, access_log=rules.access_log)

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._limits, self._arriving)
            with self._under_way():
                request, numbers = await self._on_thread(body, partial(self._parse, body))
                scope["exchange"].takes(request)
                with self._listed(numbers):
                    answer = self._answer(request, numbers, scope, receive, send)
                    await while_connected(receive, answer)
        except DisconnectedError:
            scope["exchange"].gone()

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """A request whose body has arrived. Before, it does not count: who sends none would keep
        the others out."""
        if self._active >= self._limits.requests:
            raise self._busy(f"{self._active} requests are being answered; try again later")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _on_thread(self, body: bytes, work: Callable[[], T]) -> T:
        """What `work` makes of a body. It may tokenize."""
        thread = self._quick if len(body) <= QUICK else self._slow
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    @contextlib.contextmanager
    def _listed(self, numbers: int) -> Iterator[None]:
        """While an answer that lists so many numbers is made and sent. Small ones always fit."""
        if numbers > SMALL and self._numbers + numbers > self._limits.answers:
            raise self._busy(
                f"answers under way list {self._numbers} tokens and log-probabilities, and this one"
                f" could list {numbers}: must be at most {self._limits.answers} together; try again"
                " later"
            )
        self._numbers += numbers
        try:
            yield
        finally:
            self._numbers -= numbers

    def _from_json(self, work: Callable[[Fields, Any, int], Any]) -> ASGIApp:
        """An endpoint that answers an object with what `work` makes of it, the tokenizer and the
        capacity."""

        def made(body: bytes) -> Response:
            fields = parse_json(body)
            if fields.get("model") is not None:
                self._check_model(fields)
            value = work(fields, self._tokenizer, self._capacity)
            return Response(b"".join(pieces(value)), media_type="application/json")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                body = await read_body(scope, receive, self._limits, self._arriving)
                with self._under_way():
                    response = await self._on_thread(body, partial(made, body))
                    await response(scope, receive, send)
            except DisconnectedError:
                scope["exchange"].gone()

        return answer

    def _check_model(self, fields: Fields) -> None:
        model = fields.get("model")
        if not isinstance(model, str):
            fields.wrong("model", f"a text, {self._name!r}")
        if model != self._name:
            self._unknown_model(model)

    def _parse(self, body: bytes) -> tuple[completion_request.CompletionRequest, int]:
        """The request, and how many tokens and log-probabilities its answer may list."""
        check_body(body, self._capacity)
        fields = parse_json(body)
        self._check_model(fields)
        if self._runner.state != "ok":
            raise self._closed()
        check_prompt_sizes(fields, self._capacity)
        request = completion_request.parse_request(
            fields,
            tokenizer=self._tokenizer,
            capacity=self._capacity,
            most=self._limits.sequences,
            eos_id=self._eos,
        )
        numbers = check_answer_size(request, self._limits.answer)
        _ = request.sequences  # made here, and not on the event loop
        return request, numbers

    async def _answer(
        self,
        request: completion_request.CompletionRequest,
        numbers: int,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Queue the request and send its answer. However this ends, nothing of it goes on."""
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        exchange: Exchange = scope["exchange"]
        timing, errors = Timing(self._times, exchange.began, request.choices), set[str]()

        def listen(place: int, delta: Delta) -> None:
            timing.note(place, delta)
            if delta.error and delta.error not in errors:  # of a damaged row: with the file
                errors.add(delta.error)
                LOG.error("request %s: %s", exchange.request_id, delta.error)
            loop.call_soon_threadsafe(deltas.put_nowait, (place, delta))

        group = self._runner.submit(request.sequences, listen)
        try:
            await self._accepted(group)
            timing.accepted = True
            request_id = exchange.request_id
            answer = Answer(request, self._name, self._tokenizer, self._eos, request_id)
            arriving = until_all_end(deltas, request.choices)
            if request.stream:
                exchange.ended_as = await stream(answer, arriving, send, self._encoder, request_id)
                return
            whole: list[list[Delta]] = [[] for _ in range(request.choices)]
            async for arrived in arriving:
                for place, delta in arrived:
                    whole[place].append(delta)
            if numbers <= SMALL:
                body = await asyncio.to_thread(lambda: b"".join(pieces(answer.whole(whole))))
                await Response(body, media_type="application/json")(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": JSON})
            await self._encoder.send(lambda: answer.whole(whole), send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            group.cancel()
            timing.close()
            exchange.completion_tokens, exchange.finishes = timing.sampled, timing.finishes

    async def _accepted(self, group: Group) -> None:
        try:
            await asyncio.wrap_future(group.accepted)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except QueueFullError as error:
            raise self._busy(str(error)) from None
        except ClosedError:
            raise self._closed() from None

    def _busy(self, message: str) -> ApiError:
        wait = {"Retry-After": str(self._limits.retry_after)}
        return ApiError(429, message, code="queue_full", headers=wait)

    def _closed(self) -> ApiError:
        if self._runner.state == "failed":
            return ApiError(503, FAILED, code="failed")
        wait = {"Retry-After": str(self._limits.retry_after)}
        return ApiError(503, "the server is shutting down", code="draining", headers=wait)

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "engram_jax",
            "max_model_len": self._capacity,
        }

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._name:
            self._unknown_model(request.path_params["name"])
        return json_response(self._described())

    def _unknown_model(self, name: str) -> NoReturn:
        message = f"model = {shown(name)}: must be {self._name!r}"
        raise ApiError(404, message, "model", "model_not_found")

    async def _health(self, request: Request) -> Response:
        state = self._runner.state
        found = {"status": state}
        if self._engine.memory_error:  # others are answered: no reason to restart it
            found = {"status": "degraded" if state == "ok" else state, "memory": UNREADABLE}
        return json_response(found, 200 if state == "ok" else 503)

    async def _version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def _metrics(self, request: Request) -> Response:
        text = self._times.text(self._runner.stats(), self.asgi.responses, self._active)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {shown(request.url.path)[1:-1]}"
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        message = f"{what}: must be {', '.join(allowed)}"
    elif request.url.path.startswith("/v1/chat"):
        message = f"{what}: {NO_CHAT}"
    else:
        message = f"{what}: no such route; there are {ROUTES}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
