"""Compiles host loops with numba, and has the machine operations that Python lacks.

These are prefetch, wide copies, stores past the caches and unaligned loads.

The one file with private use of numba and llvmlite: numba's code generator (`numba.core.cgutils`,
`numba.extending.intrinsic`), LLVM's instructions (`llvmlite.ir`), foreign functions
(`types.ExternalFunction`), and a setting that is changed while a function is declared
(`numba.config.CACHE_DIR`). None of it is promised to the next release: pyproject.toml bounds both
packages below the next minor one. Everything here is of the extra `serve` (config/extras.py).

The machine code is kept on disk. numba itself renews it when the file of a function changes, but
not when a compiled function that this one calls does; so it is kept under a name that all files of
the function's folder, and this one, decide.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engram_jax.hardware import storage

LINE = 64  # bytes of a cache line
_BYTE_POINTER = ir.IntType(8).as_pointer()


def host_jit(function: Callable) -> Any:
    """Compile a function without the interpreter's lock, so that threads run at once.

    A division by zero gives what C gives. Functions that it calls must be of the same folder, of
    this file, or numba's own.
    """
    settings: Any = numba.config
    before = settings.CACHE_DIR
    found = machine_code_folder(Path(function.__code__.co_filename).parent)
    try:
        if found:
            settings.CACHE_DIR = found  # read while the next line runs, and only then
        return numba.njit(nogil=True, cache=bool(found), error_model="numpy")(function)
    finally:
        settings.CACHE_DIR = before


@lru_cache
def machine_code_folder(sources: Path) -> str:
    """Where machine code of a folder's functions is kept: below $ENGRAM_CACHE, else
    ~/.cache/engram_jax. "" = nothing can be written there; it is compiled anew by every process."""
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.py"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = storage.cache_folder() / "native" / digest.hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def c_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library, by its name and numba types, for use in compiled loops."""
    return types.ExternalFunction(name, result(*arguments))


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at an address (uintp); it does not wait, and any address is valid."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        pointer = builder.inttoptr(args[0], _BYTE_POINTER)
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # to read; keep; data
        return context.get_dummy_value()

    return types.void(types.uintp), generate


prefetch: Any = _prefetch  # a type checker sees an intrinsic with one more argument


def _mover(element: Any, count: int) -> Any:
    """An intrinsic (to, from: uintp) that copies a vector of `count` integers, at any alignment."""

    @intrinsic
    def move(typing: Any, to: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = (ir.VectorType(element, count) if count > 1 else element).as_pointer()
            value = builder.load(builder.inttoptr(args[1], kind), align=1)
            builder.store(value, builder.inttoptr(args[0], kind), align=1)
            return context.get_dummy_value()

        return types.void(types.uintp, types.uintp), generate

    return move


@intrinsic
def _stream_32(typing: Any, to: Any, source: Any) -> Any:
    """Copy 32 bytes (to, from: uintp), bypassing the caches; `to` is a multiple of 32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, i32 = ir.VectorType(ir.IntType(64), 4).as_pointer(), ir.IntType(32)
        value = builder.load(builder.inttoptr(args[1], kind), align=1)
        store = builder.store(value, builder.inttoptr(args[0], kind), align=32)
        store.set_metadata("nontemporal", builder.module.add_metadata([i32(1)]))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@intrinsic
def _fence(typing: Any) -> Any:
    """Wait until streamed stores are in memory before anything that follows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


stream_32: Any = _stream_32
fence: Any = _fence
move_32 = _mover(ir.IntType(64), 4)
move_8 = _mover(ir.IntType(64), 1)
move_1 = _mover(ir.IntType(8), 1)


def _loader(bits: int, kind: Any) -> Any:
    """An intrinsic (address: uintp) -> the little-endian integer at it, at any alignment."""

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer, align=1)
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return kind(types.uintp), generate

    return load


load_8 = _loader(64, types.uint64)
load_4 = _loader(32, types.uint64)
load_1 = _loader(8, types.uint64)
