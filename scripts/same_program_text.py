"""A lowered program as text that names and places in the source do not change.

Two revisions that lower a function to the same StableHLO give the same text, whatever their files,
functions and modules are called. Everything else stays in it: operations, constants, dtypes,
shardings, layouts, donation, and the bodies of Pallas kernels for TPUs, which StableHLO carries as
MLIR bytecode full of file names and line numbers.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from jax._src import tpu_custom_call
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir, passmanager

_STRING = r'"(?:[^"\\]|\\.)*"'
_SYMBOL = re.compile(rf"{_STRING}|@(?:{_STRING}|[\w.$-]+)")
_KERNEL = re.compile(rf"backend_config = ({_STRING})")
# What a result is called in Python, and what a kernel is: names, which no number depends on.
_NAMES = re.compile(rf"\b(jax\.result_info|kernel_name) = {_STRING}")


def canonical(module: Any) -> str:
    """The text of an MLIR module of StableHLO (`Lowered.compiler_ir()`), or of one as text.

    Symbols are numbered as they appear. A kernel's body becomes its number there, and follows the
    module as text; equal bodies are one. Raises ValueError for a body that is no MLIR.
    """
    if isinstance(module, str):
        with mlir.make_ir_context() as context:
            context.allow_unregistered_dialects = True
            return canonical(ir.Module.parse(module))
    kernels: dict[str, int] = {}

    def body(match: re.Match[str]) -> str:
        config = _unquoted(match[1])
        if not config.startswith('{"custom_call_config"'):
            return match[0]
        values = json.loads(config)
        values["custom_call_config"].pop("debug_locations", None)  # jax 0.12: where it was written
        text = _kernel(base64.b64decode(values["custom_call_config"]["body"]))
        values["custom_call_config"]["body"] = f"kernel {kernels.setdefault(text, len(kernels))}"
        return f"backend_config = {json.dumps(values, sort_keys=True)}"

    text = _NAMES.sub(r'\1 = ""', _printed(module))
    # Symbols first: what is put in for a kernel is no longer one quoted string.
    text = _KERNEL.sub(body, _numbered(text))
    parts = [text, *(f"// kernel {number}\n{body}" for body, number in kernels.items())]
    return "\n".join(parts)


def _kernel(bytecode: bytes) -> str:
    """A Mosaic kernel, as it is shipped to the compiler, as text."""
    with mlir.make_ir_context() as context:
        tpu_custom_call.tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        try:
            module = ir.Module.parse(bytecode)
            pipeline = "builtin.module(mosaic-serde{serialize=false})"
            passmanager.PassManager.parse(pipeline).run(module.operation)
        except ir.MLIRError as error:
            raise ValueError(f"a kernel's body cannot be read: {error}") from error
        return _numbered(_printed(module))


def _printed(module: Any) -> str:
    return str(module.operation.get_asm(enable_debug_info=False))


def _numbered(text: str) -> str:
    """Symbols (@name) as @0, @1, ... in the order in which they appear; strings stay."""
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        found = match[0]
        return found if found[0] == '"' else f"@{numbers.setdefault(found, len(numbers))}"

    return _SYMBOL.sub(number, text)


def _unquoted(literal: str) -> str:
    r"""The value of an MLIR string literal: \22 is a character's number, \\ a backslash."""
    return re.sub(
        r"\\(?:([0-9A-Fa-f]{2})|(.))",
        lambda m: chr(int(m[1], 16)) if m[1] else m[2],
        literal[1:-1],
    )
