"""CPU operations for compiled loops: prefetch, wide copies, streaming stores, unaligned loads."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line
_BYTE_POINTER = ir.IntType(8).as_pointer()


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
