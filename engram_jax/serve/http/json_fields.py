"""Validates the JSON of a request; every mistake is one clear line with status 400.

Nothing here recurses into values, and messages show little of them: they may be huge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

MISTAKE = "internal error; the server's log says more under this request's id"
SHOWN = 60  # characters of a wrong value in a message
_IS_ID = re.compile("0|[1-9][0-9]{0,8}")


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape; the message is one line for the user."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def of_request(self, request_id: str) -> ApiError:
        """The same, which names the request beside the error: the log says more under that id."""
        self.body["request_id"] = request_id
        return self


def parse_json(body: bytes) -> Fields:
    """The object in a body. Raises ApiError, whatever the bytes are."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ApiError(400, f"body: {shown(name)} is given more than once")
            found[name] = value
        return found

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "body: JSON that is nested too deeply") from None
    except ValueError as error:  # also whole numbers of thousands of digits
        raise ApiError(400, f"body: not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"body = {shown(values)}: must be a JSON object")
    return Fields(values)


def shown(value: Any) -> str:
    """A value as a message names it: short, one line, printable."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = ascii(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}..."


class Fields:
    """The fields of an object by type. null means the default. All raise ApiError."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def wrong(self, name: str, allowed: str, code: str | None = None) -> NoReturn:
        raise ApiError(400, f"{name} = {shown(self.get(name))}: must be {allowed}", name, code)

    def integer(self, name: str, default: int | None, least: int, most: int) -> Any:
        value = self.get(name)
        if value is None:
            return default
        allowed = f"a whole number from {least} to {most}"
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.wrong(name, allowed)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not least <= value <= most:  # neither is infinity nor NaN
            self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if not (value is None or isinstance(value, bool)):
            self.wrong(name, "true or false")
        return default if value is None else value

    def one_of(self, name: str, default: str, *allowed: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if value not in allowed:
            self.wrong(name, " or ".join(map(repr, allowed)))
        return value

    def text(self, name: str, value: Any, allowed: str) -> str:
        """`value`, which is `name`'s or in its list, as text that can be encoded."""
        if not isinstance(value, str):
            self.wrong(name, allowed)
        if not _encodes(value):
            raise ApiError(400, f"{name} has a lone surrogate: must be Unicode text", name)
        return value

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A text or a list of at most `most`; longest: characters of one."""
        value = self.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        allowed = f"a text or a list of at most {most} texts of 1 to {longest} characters"
        if len(values) > most or not all(values):
            self.wrong(name, allowed)
        texts = tuple(self.text(name, item, allowed) for item in values)
        if any(len(text) > longest for text in texts):
            self.wrong(name, allowed)
        return texts

    def integers(self, name: str, most: int) -> tuple[int, ...]:
        value = self.get(name)
        if value is None:
            return ()
        good = isinstance(value, list) and len(value) <= most and all(map(is_id, value))
        if not good:
            self.wrong(name, f"a list of at most {most} token ids")
        return tuple(value)

    def biases(self, name: str, most: int, limit: float) -> tuple[tuple[int, float], ...]:
        """An object of token ids, which are JSON's texts, and numbers from -limit to limit."""
        value = self.get(name)
        if value is None:
            return ()
        allowed = f"an object of at most {most} token ids, each with a number from"
        allowed += f" {-limit:g} to {limit:g}"
        if not isinstance(value, dict) or len(value) > most:
            self.wrong(name, allowed)
        for key, bias in value.items():
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not _IS_ID.fullmatch(key) or not number or not abs(bias) <= limit:
                what = f"{name}: {shown(key)}: {shown(bias)}: must be a token id and a number from"
                raise ApiError(400, f"{what} {-limit:g} to {limit:g}", name)
        return tuple((int(key), float(bias)) for key, bias in value.items())

    def inner(self, name: str) -> Fields:
        """An object within the object."""
        value = self.get(name)
        if not (value is None or isinstance(value, dict)):
            self.wrong(name, "an object")
        return Fields({f"{name}.{key}": item for key, item in (value or {}).items()})

    def unsupported(self, name: str, neutral: tuple[Any, ...]) -> None:
        """A field that is known but not served: only values that change nothing are accepted."""
        value = self.get(name)
        if value is None or any(
            value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral
        ):
            return
        raise ApiError(
            400, f"{name} = {shown(value)}: {name} is not supported", name, "unsupported_parameter"
        )


def is_id(value: Any) -> bool:
    """Whether it may be a token id; the engine knows the vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
