"""Compiles a lowered program and returns its HLO text, even where it does not fit in memory."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from engram_jax.hardware import storage

# XLA's dumps of the optimized module: before and after libtpu has chosen how operations run.
STAGES = ("after_optimizations", "after_codegen")
UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Buffer:
    """A buffer that is alive at peak memory use: its HLO instruction, and bytes as allocated."""

    name: str
    bytes: int


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device, as memory_analysis() reports them for a program that fits.

    peak: the most that is alive at one time, code included; it is compared with the capacity.
    """

    argument: int
    output: int
    temp: int
    alias: int
    code: int
    peak: int


class DoesNotFitError(Exception):
    """The compiler rejected the program because it needs too much HBM.

    needed, available: bytes of one device, from XLA's message (which rounds to 10 MiB).
    text: the optimized module, "" if the compiler dumped none.
    memory: from the compiler's buffer assignment, None if it dumped none; without the code's size.
    buffers: those alive at the peak, largest first.
    seconds: until it was rejected.
    """

    def __init__(
        self,
        message: str,
        needed: int | None,
        available: int | None,
        text: str = "",
        memory: MemoryUse | None = None,
        buffers: tuple[Buffer, ...] = (),
        seconds: float = 0.0,
    ):
        super().__init__(message)
        self.needed, self.available = needed, available
        self.text, self.memory, self.buffers, self.seconds = text, memory, buffers, seconds


def compile_with_text(
    lowered: jax.stages.Lowered,
    options: Mapping[str, Any] | None = None,
    *,
    stage: str = STAGES[0],
    keep: Path | None = None,
) -> tuple[jax.stages.Compiled, str, float]:
    """`compile_with_texts` with the text of one of STAGES alone."""
    compiled, texts, seconds = compile_with_texts(lowered, options, keep=keep)
    return compiled, texts[stage], seconds


def compile_with_texts(
    lowered: jax.stages.Lowered,
    options: Mapping[str, Any] | None = None,
    *,
    keep: Path | None = None,
) -> tuple[jax.stages.Compiled, dict[str, str], float]:
    """Compile; return the program, the texts of its module by STAGES ("" where the compiler wrote
    none), and the seconds it took.

    The texts are XLA's own dumps, in a temporary folder: `compiled.as_text()` fails on programs
    with gathers on SparseCores. "after_codegen" also has the VMEM that kernels use and the
    compiler's estimates of cycles. The persistent compilation cache is bypassed, since a cached
    program comes without a dump.

    Args:
      lowered: from `jax.jit(...).lower(...)`.
      options: XLA's compiler options (hardware/xla_flags.py).
      keep: a path without its ending; the texts are kept as KEEP.STAGE.txt, one for each stage that
        the compiler reached. The folder is made.

    Raises:
      DoesNotFitError: too little HBM. Other errors of the compiler are raised unchanged.
    """
    with tempfile.TemporaryDirectory(prefix="engram_hlo_") as folder:
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        start = time.perf_counter()
        try:
            with _without_cache():
                compiled = lowered.compile(compiler_options={**(options or {}), **dump})
        except jax.errors.JaxRuntimeError as error:
            if not is_hbm_shortage(str(error)):
                raise
            raise _does_not_fit(str(error), Path(folder), time.perf_counter() - start) from error
        finally:
            if keep is not None:
                _keep(Path(folder), keep)
        seconds = time.perf_counter() - start
        texts = {stage: _dumped(Path(folder), f"{stage}.txt") for stage in STAGES}
        return compiled, texts, seconds


def _keep(folder: Path, keep: Path) -> None:
    keep.parent.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if text := _dumped(folder, f"{stage}.txt"):
            storage.write_text(keep.with_name(f"{keep.name}.{stage}.txt"), text)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX keeps to what it decided at the first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _dumped(folder: Path, ending: str) -> str:
    """The dump with that ending, of the largest module if there are several (helper programs)."""
    files = sorted(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else ""


def memory_of(compiled: jax.stages.Compiled) -> MemoryUse:
    """The program's memory on one device.

    peak: peak_memory_in_bytes is the largest sum of buffers alive at one time, arguments included:
    less than argument + temp + output - alias, whose parts need not be alive together. libtpu
    compares it plus the code with the capacity (found by bisection, topology.py).
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend does not analyse memory")
    return MemoryUse(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        temp=stats.temp_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes,
    )


# ---- what does not fit ---------------------------------------------------------------------------

_SIZE = r"([\d.]+)([BKMGT]?)"
# libtpu 0.0.52 estimates memory before it assigns buffers, and fails with the first message; the
# second comes from the assignment itself.
_SHORTAGES = (
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Ran out of memory in memory space hbm\. Used {_SIZE} of {_SIZE} hbm"),
)


def is_hbm_shortage(message: str) -> bool:
    """Whether XLA's message reports that HBM (not VMEM or another memory) was too small."""
    return "RESOURCE_EXHAUSTED" in message and any(s.search(message) for s in _SHORTAGES)


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, from XLA's message; None if it is about something else."""
    for shortage in _SHORTAGES:
        found = shortage.search(message)
        if found:
            return _bytes(found[1], found[2]), _bytes(found[3], found[4])
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * UNITS[unit])


def _listed_buffers(message: str) -> tuple[Buffer, ...]:
    """The "Largest program allocations in hbm" of the second kind of message."""
    listing = message.partition("Largest program allocations in hbm")[2]
    found = re.findall(rf"Size: {_SIZE}\n(?:.*\n)*?\s*XLA label: %?(\S+)", listing)
    return tuple(Buffer(name, _bytes(number, unit)) for number, unit, name in found)


def _does_not_fit(message: str, folder: Path, seconds: float) -> DoesNotFitError:
    needed, available = needed_and_available(message) or (None, None)
    assignment = _dumped(folder, "after_optimizations-buffer-assignment.txt")
    buffers = alive_at_peak(_dumped(folder, "after_optimizations-live-range.txt"), assignment)
    return DoesNotFitError(
        message.splitlines()[0],
        needed,
        available,
        text=_dumped(folder, "after_optimizations.txt"),
        memory=_assigned(assignment, needed),
        buffers=buffers or _listed_buffers(message),
        seconds=seconds,
    )


def alive_at_peak(live_ranges: str, assignment: str) -> tuple[Buffer, ...]:
    """The buffers alive at the peak, largest first: names from XLA's dump of live ranges, sizes
    with padding from its buffer assignment; values that share a buffer are listed once."""
    listing = live_ranges.partition("(peak):")[2].partition("Stack trace")[0]
    alive = set(re.findall(r"^\s+(\S+?\{[\d,]*\}): \d+ bytes", listing, re.MULTILINE))
    found: dict[tuple[str, str], Buffer] = {}
    allocation = ""
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            allocation = line.partition(":")[0]
        value = re.match(
            r" value: <\d+ (\S+?)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\)", line
        )
        if value and value[1] + (value[2] or "{}") in alive:
            found.setdefault((allocation, value[4]), Buffer(value[1], int(value[3])))
    return tuple(sorted(found.values(), key=lambda b: -b.bytes))


def _assigned(assignment: str, needed: int | None) -> MemoryUse | None:
    """Sums over XLA's dump of the buffer assignment, in which memories but HBM have a "color"."""
    argument = output = temp = alias = 0
    for line in assignment.splitlines():
        found = re.match(r"allocation \d+: size (\d+), (.*)", line)
        if not found or "color " in found[2]:
            continue
        size, what = int(found[1]), found[2]
        if "parameter " in what:
            argument += size
            if "maybe-live-out" in what:
                alias += size
        elif "maybe-live-out" in what:
            output += size
        elif "constant" not in what:
            temp += size
    if not argument + output + temp:
        return None
    output += alias  # memory_analysis() counts an aliased result on both sides
    return MemoryUse(argument, output, temp, alias, 0, needed or argument + output + temp - alias)
