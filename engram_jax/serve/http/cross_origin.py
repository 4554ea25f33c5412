"""CORS: pages of listed origins may let a browser send requests (Starlette's middleware)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from engram_jax.serve.http.json_fields import ApiError
from engram_jax.serve.http.responses import error_response

METHODS = ("GET", "POST")
READABLE = ("X-Request-Id", "Retry-After")  # headers of an answer that a page may see


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app`, with answers that allow the pages of `origins` ("*" = all) to read them."""
    return _Cors(
        app,
        allow_origins=tuple(origins),
        allow_methods=METHODS,
        allow_headers=("*",),  # those of OpenAI's clients among them
        expose_headers=READABLE,
    )


class _Cors(CORSMiddleware):
    """With the refusals in OpenAI's form."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        said = bytes(answer.body).decode()  # "Disallowed CORS origin"
        kept = {k: v for k, v in answer.headers.items() if not k.startswith("content-")}
        return error_response(ApiError(400, f"preflight: {said}", headers=kept))
