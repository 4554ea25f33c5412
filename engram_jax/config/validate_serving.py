"""Validates the section `serve` of a configuration."""

from __future__ import annotations

import re

from engram_jax.config.errors import UserError, one_of, require
from engram_jax.config.memory_schema import EngramConfig
from engram_jax.config.serving_schema import ALL_LAYERS, DEVICE, DISK, HIDDEN, ServeConfig

LOG_LEVELS = ("info", "warning", "error")
KEY = "1 to 1024 visible characters of ASCII, without a comma"
_KEY = re.compile(r"[!-+\--~]{1,1024}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,]+")


def validate_serving(serve: ServeConfig, engram: EngramConfig) -> None:
    """Raises UserError for the first rule that is broken."""
    one = -(-serve.capacity // serve.page)  # 0 if the checkpoint decides the capacity
    room = f"0, or at least the {one} of one sequence (serve.capacity / serve.page)"
    require(serve.pages == 0 or serve.pages >= one, "serve.pages", serve.pages, room)
    several = serve.prefill_sequences <= serve.sequences
    at_most = f"at most serve.sequences = {serve.sequences}"
    require(several, "serve.prefill_sequences", serve.prefill_sequences, at_most)
    require(0 <= serve.port < 2**16, "serve.port", serve.port, "from 0 to 65535")
    for key in ("device_cache", "host_cache"):
        share = getattr(serve, key)
        require(share <= 1, f"serve.{key}", share, "a share of the rows, from 0 to 1")
        off_device = share == 0 or serve.memory != DEVICE
        require(off_device, f"serve.{key}", share, "0 with serve.memory = 'device'")
    on_disk = serve.host_cache == 0 or serve.memory == DISK
    require(on_disk, "serve.host_cache", serve.host_cache, "0 unless serve.memory = 'disk'")
    needs_file = serve.memory != DISK or serve.memory_file
    a_file = "what --mode=export-memory wrote, for serve.memory = 'disk'"
    require(bool(needs_file), "serve.memory_file", "", a_file)
    read = bool(engram.layers) or not serve.memory_file
    require(read, "serve.memory_file", serve.memory_file, "'' for a model without Engram layers")
    counted = serve.device_cache == 0 or serve.frequency_file
    a_file = "what --mode=count-memory wrote, for serve.device_cache"
    require(bool(counted), "serve.frequency_file", "", a_file)
    layers = (*engram.layers, ALL_LAYERS)
    for layer in serve.off_layers:
        require(layer in layers, "serve.off_layers", layer, f"among {layers} (-1 = all)")
    for order in serve.off_orders:
        allowed = f"among model.engram.orders = {engram.orders}"
        require(order in engram.orders, "serve.off_orders", order, allowed)
    _http(serve)


def _http(serve: ServeConfig) -> None:
    for key in serve.api_key:
        if key != HIDDEN and not is_api_key(key):  # whatever it is, it is not shown
            raise UserError(f"config.serve.api_key: must be {KEY}, each")
    for origin in serve.cors_origins:
        good = origin == "*" or _ORIGIN.fullmatch(origin)
        allowed = "'*', or origins such as 'https://example.org:8443', without a path"
        require(bool(good), "serve.cors_origins", origin, allowed)
    require(serve.log_level in LOG_LEVELS, "serve.log_level", serve.log_level, one_of(LOG_LEVELS))


def is_api_key(text: str) -> bool:
    """Whether it can be a key: see `KEY`."""
    return _KEY.fullmatch(text) is not None
