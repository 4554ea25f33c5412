"""Makes a validated `Config` from a configuration file's or a stored record's values, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from engram_jax.config.errors import UserError, did_you_mean
from engram_jax.config.keys import nearest_keys, section_types, type_name
from engram_jax.config.schema import Config
from engram_jax.config.serving_schema import HIDDEN, SECRETS
from engram_jax.config.validate import validate


def default_config_dict() -> ml_collections.ConfigDict:
    """Every section and key with its default, as the starting point of a file under configs/."""
    return ml_collections.ConfigDict(_as_dict(Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON-able values (tuples stay tuples), as it may be recorded: of
    secrets it only says that there are some (HIDDEN)."""
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


def _as_dict(value: Any, prefix: str = "") -> Any:
    if dataclasses.is_dataclass(value):
        keys = [field.name for field in dataclasses.fields(value)]
        return {key: _as_dict(getattr(value, key), f"{prefix}{key}.") for key in keys}
    return (HIDDEN,) * len(value) if prefix.rstrip(".") in SECRETS else value


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} = {values!r}: must be a section with keys")
    hints = section_types(cls)
    out = {}
    for key, value in values.items():
        if key not in hints:
            near = nearest_keys(f"{where}.{key}".removeprefix("config."))
            hint = did_you_mean([f"config.{name}" for name in near])
            hint = hint or f"allowed: {', '.join(sorted(hints))}"
            raise UserError(f"{where}.{key}: unknown key; {hint}")
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
        raise UserError(f"{told(where, value)}: must be {type_name(hint)}")
    return value


def told(where: str, value: Any) -> str:
    """A key ("config.train.steps") and its value in a message."""
    secret = where.removeprefix("config.") in SECRETS
    return where if secret else f"{where} = {value!r}"
