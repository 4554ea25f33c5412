"""Makes a validated `Config` from a configuration file's or a stored record's values, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from engram_jax.config.errors import UserError
from engram_jax.config.schema import Config
from engram_jax.config.validate import validate

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def default_config_dict() -> ml_collections.ConfigDict:
    """Every section and key with its default, as the starting point of a file under configs/."""
    return ml_collections.ConfigDict(_as_dict(Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON-able values (tuples stay tuples)."""
    return _as_dict(config)


def parse_config(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Build and validate a `Config`. Raises UserError: the key, its value, what is allowed."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    parsed = config_from_dict(values)
    validate(parsed)
    return parsed


def with_changes(
    values: Mapping[str, Any], changes: Mapping[str, Any], where: str = "config"
) -> dict[str, Any]:
    """A configuration's nested values with others in place of some. changes: by dotted key
    ("train.steps"), or nested. Raises UserError for a key in what is a value, not a section."""
    found = dict(values)
    for key, value in changes.items():
        name, dot, rest = str(key).partition(".")
        inner = {rest: value} if dot else value
        if not isinstance(inner, Mapping):
            found[name] = inner
            continue
        section = found.get(name, {})
        if not isinstance(section, Mapping):
            raise UserError(f"{where}.{key}: {where}.{name} is a value, not a section")
        found[name] = with_changes(section, inner, f"{where}.{name}")
    return found


def config_from_dict(values: dict[str, Any]) -> Config:
    """A `Config` from known keys and values of the right types; raises UserError otherwise. It is
    not validated, since a record of an earlier version may break today's rules."""
    built: Config = _build(Config, values, "config")
    return built


def section_types(hint: Any) -> dict[str, Any]:
    """Key -> type of a section; {} for the type of a plain value."""
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def type_name(hint: Any) -> str:
    """The name of a value's type in error messages."""
    items = typing.get_args(hint)
    return f"a list, each {_TYPE_NAMES[items[0]]}" if items else _TYPE_NAMES[hint]


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} = {values!r}: must be a section with keys")
    hints = section_types(cls)
    out = {}
    for key, value in values.items():
        if key not in hints:
            allowed = ", ".join(sorted(hints))
            raise UserError(f"{where}.{key}: unknown key; allowed: {allowed}")
        build = _build if section_types(hints[key]) else _coerce
        out[key] = build(hints[key], value, f"{where}.{key}")
    return cls(**out)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Converts a single value to a tuple of one and an int to a float, and nothing else."""
    if items := typing.get_args(hint):
        values = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(items[0], item, where) for item in values)
    is_bool = isinstance(value, bool)  # which is an int, too
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if not isinstance(value, hint) or is_bool != (hint is bool):
        raise UserError(f"{where} = {value!r}: must be {type_name(hint)}")
    return value
