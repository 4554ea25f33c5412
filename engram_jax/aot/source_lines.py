"""Where in the traced program an instruction comes from: file and line, from an HLO module's text.

jax names them in tables of stack frames before the first computation (`FileNames`, `FunctionNames`,
`FileLocations`, `StackFrames`) or, in older texts, in an instruction's metadata itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from engram_jax.aot.hlo_parser import Instruction

_ROOT = Path(__file__).resolve().parents[2]
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PACKAGES = re.compile(r".*/(?:site|dist)-packages/")


class SourceLines:
    """The stack frames of one module's text."""

    def __init__(self, text: str):
        tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        rows: dict[int, str] | None = None
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")):
                break
            rows = tables.get(line, rows)
            number, _, rest = line.partition(" ")
            if rows is not None and number.isdigit():
                rows[int(number)] = rest
        files = {k: v.strip('"') for k, v in tables["FileNames"].items()}
        places = {}
        for k, row in tables["FileLocations"].items():
            if (file := _number(row, "file_name_id")) in files:
                places[k] = files[file], _number(row, "line")
        frames = tables["StackFrames"]
        # A frame's parent is written plus one (0 would be none): the first frame, which has none,
        # then seems its own parent. Other writers' first frame names 0.
        shift = int(bool(frames) and _number(frames[min(frames)], "parent_frame_id") != 0)
        self._frames = {
            k: (
                places.get(_number(row, "file_location_id")),
                _number(row, "parent_frame_id") - shift,
            )
            for k, row in frames.items()
        }

    def of(self, instruction: Instruction) -> tuple[str, ...]:
        """("layers/mla.py:88", "model/block.py:40"): the innermost line that is in no installed
        package (else the innermost), and the line in another file that it was called from. Empty if
        the text does not say."""
        stack = self._stack(instruction)
        own = [frame for frame in stack if not _PACKAGES.match(frame[0])] or stack
        if not own:
            return ()
        outside = [frame for frame in own if frame[0] != own[0][0]]
        return tuple(f"{_short(file)}:{line}" for file, line in [own[0], *outside[:1]])

    def _stack(self, instruction: Instruction) -> list[tuple[str, int]]:
        """(file, line), innermost first."""
        found = re.search(r"metadata=\{(.*?)\}(?:, |$)", instruction.attributes)
        metadata = found[1] if found else ""
        stack: list[tuple[str, int]] = []
        frame = _number(metadata, "stack_frame_id")
        while frame in self._frames and len(stack) < 256:
            place, frame = self._frames[frame]
            if place:
                stack.append(place)
        file = re.search(r'source_file="([^"]*)"', metadata)
        if not stack and file:
            stack.append((file[1], _number(metadata, "source_line")))
        return stack


def _number(row: str, key: str) -> int:
    """`key=7` in a row; 0 without it."""
    found = re.search(rf"\b{key}=(\d+)", row)
    return int(found[1]) if found else 0


def _short(file: str) -> str:
    """A path within this project, within an installed package, or its last two parts."""
    if file.startswith(f"{_ROOT}/"):
        return file.removeprefix(f"{_ROOT}/")
    package = _PACKAGES.match(file)
    return file[package.end() :] if package else "/".join(file.split("/")[-2:])
