"""The text of --help: modes with the flags that each reads, flags, and the configuration's keys."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

from engram_jax.config.keys import meanings, sections
from engram_jax.run.modes import MODES, MODES_OF_FLAGS

_WIDTH = 100
_ASKS = ("-h", "-?", "--h", "--?", "-help", "--help", "-helpshort", "--helpshort")
_ASKS_FULL = ("-helpfull", "--helpfull")
_HEAD = """\
usage: python launch.py --config=FILE [--mode=MODE] [--FLAG=VALUE] [--config.SECTION.KEY=VALUE]
       python launch.py --workdir=FOLDER ...    of a run: with its own configuration

  python launch.py --config=configs/engram_tiny.py --config.train.steps=100
  python launch.py --workdir=runs/engram_tiny --mode=generate --prompt="def main("
  python launch.py --workdir=runs/engram_tiny --mode=serve --config.serve.port=8000
"""


def asked_for(argv: Sequence[str]) -> str:
    """ "help" or "helpfull", if a command line asks for it; else ""."""
    given = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if any(argument in _ASKS_FULL for argument in given):
        return "helpfull"
    return "help" if any(argument in _ASKS for argument in given) else ""


def help_text(flag_values: flags.FlagValues, own: str, *, full: bool) -> str:
    """All of it. own: a flag of the program's. full: with the flags of the libraries."""
    module = flag_values.find_module_defining_flag(own)
    lines = [_HEAD, "modes, and the flags that only they read:", ""]
    for mode, about in MODES.items():
        lines += _entry(mode, about)
        read = [f"--{flag}" for flag, modes in MODES_OF_FLAGS.items() if mode in modes]
        lines += _wrapped(" ".join(read), 6) if read else []
    lines += ["", "flags:", ""]
    mine = flag_values.get_flags_for_module(module)
    for flag in sorted(mine, key=lambda flag: flag.name):
        if "." not in flag.name:  # else an override
            default = "" if flag.default in (None, [], False) else f"={flag.default}"
            lines += _entry(f"--{flag.name}{default}", flag.help)
    lines += ["", *_keys()]
    if full:
        for other in sorted(flag_values.flags_by_module_dict()):
            lines += [] if other == module else ["", flag_values.module_help(str(other))]
    return "\n".join(lines)


def _keys() -> Iterator[str]:
    yield "keys of the configuration, their defaults and meanings (docs/configuration.md has more;"
    yield "a FILE may set others; a list is written a,b):"
    for name, section in sections():
        about, meaning = meanings(section)
        if not meaning:
            continue
        prefix = f"--config.{name}." if name else "--config."
        yield from ("", *_wrapped(f"{name or 'Top level'}: {about}", 0))
        for field in dataclasses.fields(section):
            if field.name in meaning:
                value = ",".join(map(str, v)) if isinstance(v := field.default, tuple) else v
                yield from _entry(f"{prefix}{field.name}={value}", meaning[field.name])


def _entry(name: str, text: str) -> list[str]:
    return _wrapped(f"{name}  {' '.join(text.split())}", 2)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_on_hyphens=False,
        break_long_words=False,
    )
