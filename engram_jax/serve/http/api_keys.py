"""API keys: where they are read from, and the check that stands before everything else.

As in vLLM and llama.cpp a request has one as `Authorization: Bearer KEY`, and what only watches the
server needs none. Unlike vLLM, every other path needs one, not only those under /v1.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import local_path, read_text
from engram_jax.config.serving_schema import HIDDEN
from engram_jax.config.validate_serving import KEY, is_api_key
from engram_jax.serve.http.json_fields import ApiError
from engram_jax.serve.http.responses import error_response

VARIABLE = "ENGRAM_API_KEY"
OPEN = ("/health", "/version", "/metrics")
NEEDED = "Authorization: must be 'Bearer KEY' with one of the server's API keys"


def api_keys(serve: ServeConfig, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the configuration, of its file and of $ENGRAM_API_KEY; () = none is needed.

    Raises UserError for one that cannot be a key, for a place that was named and has none, and for
    a run's own configuration that had keys, which are not recorded, if none is given now.
    """
    found = [key for key in serve.api_key if key != HIDDEN]
    if (given := environment.get(VARIABLE)) is not None:
        found += _usable([key.strip() for key in given.split(",")], f"${VARIABLE}")
    if serve.api_key_file:
        path = local_path("config.serve.api_key_file", serve.api_key_file)
        lines = read_text(path, "config.serve.api_key_file").splitlines()
        found += _usable([line.strip() for line in lines if line.strip()], shown(path))
    if not found and HIDDEN in serve.api_key:
        raise UserError(
            "config.serve.api_key: this configuration had keys, which no record has: give them"
            f" again, by this key, config.serve.api_key_file or ${VARIABLE};"
            " --config.serve.api_key=() serves without"
        )
    return tuple(dict.fromkeys(found))


def _usable(keys: Sequence[str], where: str) -> Sequence[str]:
    if not keys or not all(map(is_api_key, keys)):  # which are not shown
        raise UserError(f"{where}: has no key, or one that is not usable: must be {KEY}, each")
    return keys


class KeyCheck:
    """Answers requests without a key with 401, before their body is read; passes others on."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        sent = any(name == b"authorization" for name, _ in scope["headers"])
        headers = {"WWW-Authenticate": 'Bearer error="invalid_token"' if sent else "Bearer"}
        error = ApiError(401, NEEDED, code="invalid_api_key", headers=headers)
        await error_response(error)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].strip().partition(b" ")
        # Digests are of one length, and all are compared: the time says nothing about a key.
        mine = _digest(key.strip())
        same = [hmac.compare_digest(mine, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(same)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
