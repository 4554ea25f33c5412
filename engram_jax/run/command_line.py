"""Parses the command line; every mistake in it is reported as one clear line.

The flags themselves: engram_jax/program_flags.py.
"""

from __future__ import annotations

import errno
import functools
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from engram_jax import config as config_lib
from engram_jax.checkpoint.workdir import RUN
from engram_jax.config.errors import UserError, did_you_mean, shown
from engram_jax.config.given_files import local_path
from engram_jax.config.keys import nearest, nearest_keys, types_of_keys
from engram_jax.config.parse import told
from engram_jax.hardware.interrupts import INTERRUPTED, ends_by_itself, interrupted_line
from engram_jax.hardware.platforms import without_tpu
from kernels_pallas.dispatch import UnsupportedError

T = TypeVar("T")

# What a disk or a system that has run out says, also where Python does not know the file.
_OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE),
    *(errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE),
)

# Where config_flags looks for overrides (its `sys_argv`): sys.argv, when it is read. Looking there
# itself, it opens flag files while modules are imported, and their faults are tracebacks.
ARGV: list[str] = []

_LONGEST_FLAG = 100  # characters; none of ours is half as long

_READERS: dict[type, Callable[[str], Any]] = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    str: str,
    tuple: tuple_parser.TupleParser().parse,
}


def parse_command_line(
    argv: Sequence[str], flag_values: flags.FlagValues, config_flag: str
) -> None:
    """absl's parser, preceded by checks with clearer messages than absl's. Raises UserError.

    config_flag: names a config_flags file flag; where only the --workdir of a run is given, the
      run's own configuration takes its place (run_record.get_config).
    """
    try:
        argv = flag_values.read_flags_from_files(argv, force_gnu=False)
    except (flags.Error, OSError) as error:
        raise UserError(f"--flagfile: {one_line(error).removeprefix('ERROR:: ')}") from None
    argv = _last_given(_with_config_of_run(list(argv), config_flag), config_flag)
    argv = _with_lists(argv, config_flag)
    sys.argv = ARGV[:] = argv
    for name, value in _arguments(argv):
        if name == config_flag:
            config_file(f"--{config_flag}", value or "")
        section, _, key = name.partition(".")
        if key and section in (config_flag, f"no{config_flag}"):
            _check_override(config_flag, key, value, negated=section != config_flag)
        elif len(name) > _LONGEST_FLAG:  # absl's own search for a similar one recurses into it
            raise _unknown_flag(name, flag_values, config_flag)
    try:
        rest = flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, flag_values, config_flag) from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: must be of the form --flag=value")


class _SwitchOrNames(flags.ArgumentParser):
    """Reads "true" as True, "false" as False, and a,b as ("a", "b")."""

    def parse(self, argument: Any) -> bool | tuple[str, ...]:
        if isinstance(argument, bool | tuple):
            return argument
        if argument in ("true", "false"):
            return argument == "true"
        names = tuple(name.strip() for name in argument.split(","))
        if not all(names):
            raise ValueError("has an empty name")
        return names

    def flag_type(self) -> str:
        return "switch, or names"


class _AsGiven(flags.ArgumentSerializer):
    """The inverse."""

    def serialize(self, value: bool | tuple[str, ...]) -> str:
        return str(value).lower() if isinstance(value, bool) else ",".join(value)


def switch_or_names(name: str, about: str) -> flags.Flag:
    """A flag to be defined that is given alone, --NAME, or with names, --NAME=a,b; its value is
    True or the names, False without it."""
    made = flags.Flag(_SwitchOrNames(), _AsGiven(), name, False, about)
    made.boolean = True  # absl: it needs no value
    return made


def _unknown_flag(name: str, flag_values: flags.FlagValues, config_flag: str) -> UserError:
    """Says what a wrong flag may mean: keys of that name, else the most similar flag, else key."""
    known = flag_values.get_flags_for_module(flag_values.find_module_defining_flag(config_flag))
    names = sorted(flag.name for flag in known if "." not in flag.name)
    keys = [f"--{config_flag}.{key}" for key in nearest_keys(name)]
    same = [key for key in keys if key.endswith(f".{name.replace('-', '_')}")]
    similar = nearest(name.replace("-", "_"), names)
    allowed = ", ".join([f"--{config_flag}.KEY", *(f"--{known}" for known in names)])
    hint = did_you_mean(same or ([f"--{similar}"] if similar else keys))
    hint = hint or f"allowed: {allowed}; --help lists them, and the keys"
    return UserError(f"--{shown(name)}: unknown flag; {hint}")


def config_of(value: Any, config_flag: str) -> config_lib.Config:
    """The validated configuration of a parsed config flag's value."""
    if value is None:
        raise UserError(
            f"--{config_flag}: missing; for example configs/engram_tiny.py (or --workdir, that of a"
            " run, alone)"
        )
    return config_lib.parse_config(value)


def given(argv: Sequence[str], name: str) -> str:
    """The text that a command line gives a flag, the last time; "" if it does not."""
    return dict(_arguments(argv)).get(name) or ""


def overrides(argv: Sequence[str], config_flag: str) -> dict[str, str]:
    """Key -> text of every --config.KEY=VALUE of a command line that `parse_command_line` took."""
    found: dict[str, str] = {}
    for name, value in _arguments(argv):
        section, _, key = name.partition(".")
        if key and section == f"no{config_flag}":
            found[key] = "false"
        elif key and section == config_flag:
            found[key] = "true" if value is None or value.startswith("-") else value
    return found


def override(config: ConfigDict, values: Mapping[str, str]) -> None:
    """Set keys to values that are given as text, as on a command line."""
    for key, text in values.items():
        hint: Any = config_lib.Config
        for name in key.split("."):
            hint = config_lib.section_types(hint)[name]
        reader = _READERS[tuple if hint not in _READERS else hint]
        config.update_from_flattened_dict({key: reader(text)})


def reported(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: errors of the user or the machine end the program with one line and status 2.

    Everything else is a bug and keeps its traceback.
    """

    @functools.wraps(function)
    def wrapped(*args: Any) -> T:
        try:
            return function(*args)
        except UserError as error:
            _stop(one_line(error))
        except UnsupportedError as error:
            _stop(f"config.model.kernels = 'pallas': {one_line(error)}")
        except KeyboardInterrupt:
            ends_by_itself()
            _stop(interrupted_line(), status=INTERRUPTED)
        except BrokenPipeError:  # `| head`: the reader is gone, and would not see a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.filename is None and error.errno not in _OF_THE_MACHINE:
                raise
            where = "" if error.filename is None else f"{shown(error.filename)}: "
            _stop(f"{where}{error.strerror}")
        except RuntimeError as error:  # JaxRuntimeError, without importing jax
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            _stop(f"the device's memory does not suffice: {one_line(error)}")

    return wrapped


def keep_compiled_programs(config: config_lib.Config) -> None:
    """Enable JAX's persistent compilation cache, so that a program is compiled once per machine.

    It is stored beside the prepared data, unless JAX_COMPILATION_CACHE_DIR names another folder.
    """
    import jax

    from engram_jax.data.cache import cache_root

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "compiled"))


def leave_out_absent_tpu() -> None:
    """Where libtpu is installed and no TPU is there, tell JAX: it would print libtpu's errors.

    $JAX_PLATFORMS, and plugins other than CUDA's and ROCm's, are left alone.
    """
    import jax

    if jax.config.values["jax_platforms"] is None and (platforms := without_tpu()):
        jax.config.update("jax_platforms", platforms)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of everything that looks like a flag; the value may be the next argument."""
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            return
        if argument.startswith("-"):
            name, given, value = argument.lstrip("-").partition("=")
            following = argv[i + 1] if i + 1 < len(argv) else None
            yield name, value if given else following


def _with_config_of_run(argv: list[str], config_flag: str) -> list[str]:
    given = dict(_arguments(argv))
    if config_flag in given or not given.get("workdir"):
        return argv
    workdir = local_path("--workdir", given.get("workdir") or "")
    if not os.path.exists(workdir / RUN):
        return argv
    file = Path(__file__).parent.parent / "checkpoint" / "run_record.py"
    own = f"--{config_flag}={file}:{given.get('step') or 'latest'}:{workdir}"
    return [argv[0], own, *argv[1:]]


def _with_lists(argv: list[str], config_flag: str) -> list[str]:
    """The command line with each list of texts as config_flags reads it: --config.KEY=a,b is a
    tuple of two texts, which it takes for one text or refuses. A Python literal is left alone, and
    what has spaces: a comma may be part of the text."""
    texts = [key for key, hint in types_of_keys().items() if hint == tuple[str, ...]]
    names = {f"{config_flag}.{key}" for key in texts}
    out = list(argv)
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        name, given, value = argument.partition("=")
        if not argument.startswith("-") or name.lstrip("-") not in names:
            continue
        at = i if given else i + 1
        value = value if given else "".join(argv[at : at + 1])
        if value and value[0] not in "([\"'" and not any(map(str.isspace, value)):
            out[at] = f"{name}={value.split(',')!r}" if given else repr(value.split(","))
    return out


def _last_given(argv: list[str], config_flag: str) -> list[str]:
    """The command line without the configurations and lists that a later argument for the same
    replaces, as it does with every other value: config_flags would join lists, and leave an empty
    one out."""
    last: dict[str, int] = {}
    places: list[tuple[str, int, int]] = []  # key, first argument, one past the last
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        name, given, _ = argument.lstrip("-").partition("=")
        section, _, key = name.partition(".")
        if argument.startswith("-") and section == config_flag and (not key or _is_list(key)):
            places.append((key, i, i + (1 if given else 2)))
            last[key] = i
    dropped = {n for key, i, end in places if i != last[key] for n in range(i, end)}
    return [argument for n, argument in enumerate(argv) if n not in dropped]


def _is_list(key: str) -> bool:
    hint: Any = config_lib.Config
    for name in key.split("."):
        hint = config_lib.section_types(hint).get(name)
    return hint is not None and hint not in _READERS and not config_lib.section_types(hint)


def config_file(flag: str, value: str) -> ConfigDict:
    """What the configuration file FILE or FILE:ARGUMENT returns, the value of `flag` ("--config").

    It must exist, run, and return a configuration. config_flags runs it again; its own messages
    lack the line number or span several lines. Raises UserError.
    """
    path, colon, argument = value.partition(":")
    where = f"{flag}={path}"
    if not Path(path).is_file():
        raise UserError(f"{flag}={shown(path)}: no such file; for example configs/engram_tiny.py")
    try:
        get_config = runpy.run_path(path).get("get_config")
        found = get_config(*[argument] if colon else []) if get_config else None
    except UserError:
        raise
    except SystemExit as end:
        raise UserError(f"{where}: ends the program (sys.exit({end.code!r}))") from end
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line, reason = (lines or [None])[-1], one_line(error)
        if isinstance(error, SyntaxError):
            line, reason = error.lineno, error.msg
        place = f"line {line}: " if line else ""
        raise UserError(f"{where}: {place}{type(error).__name__}: {reason}") from error
    if not isinstance(found, ConfigDict):
        wrong = f"get_config() returns {type(found).__name__}" if get_config else "no get_config()"
        raise UserError(
            f"{where}: {wrong}; must define get_config() returning an ml_collections.ConfigDict"
        )
    return found


def _check_override(config_flag: str, key: str, value: str | None, *, negated: bool) -> None:
    """The key must exist and the value have its type."""
    hint: Any = config_lib.Config
    names = key.split(".")
    for i, name in enumerate(names):
        section = config_lib.section_types(hint)
        if name not in section:
            there = ".".join([config_flag, *names[:i]])
            near = [f"--{config_flag}.{other}" for other in nearest_keys(key)] if section else []
            allowed = f"{there} has {', '.join(section)}" if section else f"{there} is a value"
            hint = did_you_mean(near) or allowed
            raise UserError(f"{config_flag}.{shown(key)}: unknown key {name!r}; {hint}")
        hint = section[name]
    if section := config_lib.section_types(hint):
        raise UserError(
            f"{config_flag}.{key}: is a section, not a value; set its keys, {', '.join(section)}"
        )
    if hint is bool and (negated or value is None or value.startswith("-")):
        return
    wanted = config_lib.type_name(hint)
    if negated or value is None:
        raise UserError(f"{config_flag}.{key}: has no value; must be {wanted}")
    try:
        _READERS[tuple if hint not in _READERS else hint](value)
    except (ValueError, TypeError):
        raise UserError(f"{told(f'{config_flag}.{key}', value)}: must be {wanted}") from None
