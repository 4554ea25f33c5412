"""Write docs/configuration.md: every key of the configuration, from the code that decides it.

    python -m scripts.config_reference

Types, defaults and meanings are those of config/schema.py: a line `key: meaning` of a docstring,
one for every key. What is allowed is asked of config/validate.py: it is given wrong values, and its
answers say what would have been right.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

from engram_jax.checkpoint.run_settings import FREE, covers
from engram_jax.config import Config, section_types, type_name
from engram_jax.config.errors import UserError
from engram_jax.config.keys import meanings, sections
from engram_jax.config.validate import validate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
WRONG: dict[Any, tuple[Any, ...]] = {
    int: (-2, 0, 7, 2**31 - 1),
    float: (-2.0, 0.0, 0.5, 2.0, float("nan")),
    bool: (),
    str: ("", "?"),
    tuple[int, ...]: ((), (-2,), (3, 2), (1, 2, 3), (2**31 - 1,)),
    tuple[float, ...]: ((-2.0,), (0.5,)),
    tuple[str, ...]: (("",),),
}
# The answers may depend on other keys: asked beside the defaults, and beside these.
BESIDE: dict[str, Any] = {
    "model.ffn.routed_experts": 8,
    "model.ffn.top_k": 2,
    "model.ffn.expert_dim": 64,
    "model.engram.layers": (1, 3),
    "serve.memory": "disk",
    "serve.memory_file": "memory.safetensors",
    "serve.frequency_file": "counts.npz",
    "serve.device_cache": 0.01,
    "optimizer.schedule": "wsd",
    "optimizer.decay_share": 0.2,
}

HEAD = """\
# Configuration

<!-- Written by `python -m scripts.config_reference` from engram_jax/config/; do not edit. -->

A file under `configs/` sets these keys; `--config.SECTION.KEY=VALUE` overrides one on the command
line, a list as `--config.model.engram.layers=1,3`. A wrong key or an impossible value stops with
one line that says what is allowed. Where that depends on other keys, this page says what holds
beside the defaults, and for a model with memory and experts that is served from a file. Letters
such as B or T are the [symbols](#symbols) at the end.

Keys with a ° decide no result: a launch may change them in a used workdir. Every other key is
compared with the run's ([tutorial](tutorial.md#the-settings-of-a-run)).
"""


def replaced(section: Any, item: tuple[str, Any]) -> Any:
    """A section with another value at a key of it, or of a section in it."""
    (name, _, rest), value = item[0].partition("."), item[1]
    value = replaced(getattr(section, name), (rest, value)) if rest else value
    return dataclasses.replace(section, **{name: value})


def allowed(key: str, hint: Any) -> str:
    """What a key's value must be, in the words in which other values are refused."""
    told: list[str] = []
    for beside in ({}, BESIDE):
        config = functools.reduce(replaced, beside.items(), Config())
        for value in WRONG[hint]:
            try:
                validate(replaced(config, (key, value)))
            except UserError as error:
                where, _, what = str(error).partition(": must be ")
                if where.split(" = ")[0] == f"config.{key}" and what not in told:
                    told.append(what)
    if len(told) > 1:  # every number must be finite, and every whole one bounded
        told = [text for text in told if text not in ("a finite number", "below 2**31")]
    return "; ".join(told)


def render() -> str:
    """The page."""
    out = [HEAD]
    for name, section in sections():
        about, meaning = meanings(section)
        out += [f"## {name or 'Top level'}", "", about, ""]
        if meaning:
            out += ["| key | value | default | allowed | meaning |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(section):
            if field.name not in meaning:
                continue
            hint = section_types(section)[field.name]
            key = f"{name}.{field.name}".lstrip(".")
            mark = "°" if covers(FREE, key) else ""
            cells = (
                f"`{field.name}`{mark}",
                type_name(hint),
                f"`{field.default!r}`",
                _cell(allowed(key, hint)),
                _cell(meaning[field.name]),
            )
            out.append(f"| {' | '.join(cells)} |")
        out += [""] if meaning else []
    return "\n".join([*out, "## Symbols", "", *_symbols(), ""])


def _symbols() -> list[str]:
    """The table of letters in the docstring of config/schema.py."""
    from engram_jax.config import schema

    block = next(b for b in inspect.getdoc(schema).split("\n\n") if b.startswith("    B  batch"))
    return ["```text", *(line[4:].rstrip() for line in block.splitlines()), "```"]


def _cell(text: str) -> str:
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE.name}")
