"""The format of a memory file: safetensors, with checksums and page-aligned tensors.

    8 bytes, header length n (little-endian) | n bytes of JSON, padded with spaces | tensors

Layer L of a model has the tensors (names and types of DeepSeek-V4.1's release)

    layers.L.engram.embed.weight    F32, BF16 or F8_E4M3 [rows, dim]
    layers.L.engram.embed.scale     F8_E8M0 [rows, dim / 32], fp8 only
    ....weight.xxh64, ....scale.xxh64   U64: XXH64, seed 0, of each block of whole rows

and `header.xxh64`, U64 [1], covers the n bytes of JSON. The data and, thanks to `....padding`
tensors of zeros (safetensors allows no gaps), every tensor begin at a multiple of 4,096, so that a
block of 4,096 bytes is one page. `__metadata__` has "format", "version", "fingerprint" (of the
addressing, hex) and "layers", a JSON object: per layer its row format and the rows per block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram_jax.config.errors import UserError, shown
from engram_jax.memory.store.row_format import RowFormat

PAGE = 4096
FORMAT, VERSION = "engram_jax memory", "1"
RESERVED = ("format", "version", "fingerprint", "layers")
MOST_HEADER = 1 << 20  # bytes; a layer takes about 1,000
CHECKSUM = ".xxh64"
HEADER_CHECKSUM = "header" + CHECKSUM
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "U64": 8}
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class Tensor:
    """One entry: dtype and shape as in safetensors; bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class LayerHeader:
    """One table: its row format, number of rows, and rows per checksummed block of each part."""

    format: RowFormat
    rows: int
    block_rows: tuple[int, ...]


def tensor_name(layer: str, suffix: str) -> str:
    return f"layers.{layer}.engram.embed.{suffix}"


def block_rows(row_format: RowFormat) -> tuple[int, ...]:
    """Rows per block of each part: as many as fit 4,096 bytes, at least one."""
    return tuple(max(1, PAGE // size) for _, size in row_format.parts)


def _expected(layers: Mapping[str, LayerHeader]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor but the padding, in the file's order."""
    data, sums = {}, {}
    for layer, head in layers.items():
        for (suffix, size), rows in zip(head.format.parts, head.block_rows, strict=True):
            name = tensor_name(layer, suffix)
            dtype = "F8_E8M0" if suffix == "scale" else _DTYPES[head.format.name]
            data[name] = (dtype, (head.rows, size // _ITEM_BYTES[dtype]))
            sums[name + CHECKSUM] = ("U64", (-(-head.rows // rows),))
    return {**data, **sums, HEADER_CHECKSUM: ("U64", (1,))}


def plan_tensors(layers: Mapping[str, LayerHeader]) -> dict[str, Tensor]:
    """The place of every tensor in the file, padding included."""
    tensors, at = {}, 0
    for name, (dtype, shape) in _expected(layers).items():
        end = at + _size(dtype, shape)
        tensors[name] = Tensor(dtype, shape, at, end)
        at = end
        if name != HEADER_CHECKSUM and end % PAGE:
            at += PAGE - end % PAGE
            tensors[name + ".padding"] = Tensor("U8", (at - end,), end, at)
    return tensors


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    size = _ITEM_BYTES[dtype]
    for extent in shape:
        size *= extent
    return size


def to_bytes(
    layers: Mapping[str, LayerHeader], fingerprint: str, metadata: Mapping[str, str]
) -> bytes:
    """The header: length and JSON, a multiple of 4,096 bytes. Raises UserError for metadata that is
    not a string, has a reserved name or is too long."""
    for key, value in metadata.items():
        if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise UserError(
                f"metadata {key!r}: names and values must be strings, and the names"
                f" {', '.join(RESERVED)} are the format's own"
            )
    described = {
        layer: {"format": h.format.name, "dim": h.format.dim, "block_rows": h.block_rows}
        for layer, h in layers.items()
    }
    own = dict(zip(RESERVED, (FORMAT, VERSION, fingerprint, json.dumps(described)), strict=True))
    entries: dict[str, Any] = {"__metadata__": {**own, **metadata}}
    for name, t in plan_tensors(layers).items():
        entries[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": (t.begin, t.end)}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    if len(text) > MOST_HEADER:
        raise UserError(f"metadata: the header would take {len(text)} bytes, at most {MOST_HEADER}")
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Header:
    """The result of `parse_header`: tensors by name, the metadata, the tables by layer id."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    layers: dict[str, LayerHeader]


def parse_header(text: bytes, data_bytes: int) -> Header:
    """The JSON of a header, checked against the number of bytes after it.

    Raises ValueError, one line without the file's name, unless it is exactly a file of this format:
    tensors tile the data without gap or overlap, and are those that the metadata describes.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = shown(str(error).splitlines()[0], quoted=False)
        raise ValueError(f"the header is no valid JSON ({reason})") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is no object of strings")
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"a foreign file: metadata 'format' is not {FORMAT!r} (made by write_memory)"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"format version {shown(metadata.get('version'), quoted=True)}, this program reads"
            f" {VERSION}"
        )
    if "fingerprint" not in metadata:
        raise ValueError("metadata has no fingerprint")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_tiling(tensors, data_bytes)
    layers = _layers(metadata.get("layers", ""), tensors)
    wanted = plan_tensors(layers)
    for name in [*wanted, *tensors]:
        if wanted.get(name) != tensors.get(name):
            raise ValueError(
                f"tensor {shown(name)}: {_say(tensors.get(name))}, must be {_say(wanted.get(name))}"
            )
    return Header(tensors, metadata, layers)


def _say(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tensor.dtype} {list(tensor.shape)} at {tensor.begin}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)}: must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    name = shown(name)
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(
            f"tensor {name}: dtype {shown(dtype, quoted=True)}, must be one of"
            f" {', '.join(_ITEM_BYTES)}"
        )
    if not isinstance(shape, list) or len(shape) > 2 or not all(map(_whole, shape)):
        raise ValueError(f"tensor {name}: the shape must be at most two numbers from 0 on")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise ValueError(f"tensor {name}: data_offsets must be two numbers from 0 on")
    begin, end = offsets
    if end - begin != _size(dtype, tuple(shape)):
        raise ValueError(
            f"tensor {name}: {dtype} {shape} takes {_size(dtype, tuple(shape))} bytes,"
            f" data_offsets span {end - begin}"
        )
    return Tensor(dtype, tuple(shape), begin, end)


def _check_tiling(tensors: Mapping[str, Tensor], data_bytes: int) -> None:
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps the one before" if tensor.begin < at else "leaves a gap before it"
            raise ValueError(
                f"tensor {shown(name)}: begins at {tensor.begin} and {what}, which ends at {at}"
            )
        at = tensor.end
    if at != data_bytes:
        what = "truncated" if data_bytes < at else "too long"
        raise ValueError(f"{what}: {data_bytes} bytes of data, the header says {at}")


def _layers(described: str, tensors: Mapping[str, Tensor]) -> dict[str, LayerHeader]:
    layers = {}
    try:
        for layer, entry in json.loads(described, object_pairs_hook=_object).items():
            if not all(map(_whole, (entry["dim"], *entry["block_rows"]))):  # 3.0 == 3, and no index
                raise ValueError(f"layer {shown(layer)}: dim and block_rows must be whole numbers")
            row_format = RowFormat(entry["format"], entry["dim"])
            weight = tensors[tensor_name(layer, "weight")]
            layers[layer] = LayerHeader(row_format, weight.shape[0], tuple(entry["block_rows"]))
            if layers[layer].block_rows != block_rows(row_format):
                raise ValueError(
                    f"layer {shown(layer)}: block_rows must be {block_rows(row_format)}"
                )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = shown(f"{type(error).__name__}: {error}".splitlines()[0], quoted=False)
        raise ValueError(f"metadata 'layers' does not describe the tensors ({reason})") from error
    return layers
