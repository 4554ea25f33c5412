"""One program for everything: train, evaluate, generate from, serve, describe or compile a model.

    python launch.py --config=configs/engram_tiny.py
    python launch.py --config=configs/engram_tiny.py --mode=generate --prompt="def main("
    python launch.py --config=configs/engram_tiny.py --mode=serve --config.serve.port=8000
    python launch.py --config=configs/engram27b.py --mode=describe --json
    python launch.py --config=configs/engram27b.py --mode=compile --topology=v5p:4x4x8

Any key of the configuration can be overridden: --config.train.steps=100. A run lives in its
--workdir (default runs/<config.name>); the same command resumes it, and --workdir alone takes the
configuration that is stored there. On a TPU slice give every host
the same command; elsewhere --coordinator_address, --num_processes and --process_id join processes.
"""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from engram_jax import command_line, run_settings
from engram_jax.errors import UserError

MODES = (
    "train",
    "evaluate",
    "generate",
    "serve",
    "export-memory",
    "count-memory",
    "describe",
    "compile",
)
OPENS_A_RUN = ("train", "evaluate", "generate", "serve", "export-memory")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file under configs/; default: what the --workdir of a run has stored."
)
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/<config.name>.")
_JSON = flags.DEFINE_bool(
    "json", False, "describe, evaluate, compile: one JSON object on standard output."
)
_PROMPT = flags.DEFINE_string("prompt", None, "generate: the text to continue.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile: the TPU slice, for example v5p:4x4x8; none needs to be there."
)
_PROGRAM = flags.DEFINE_string("program", "train", "compile: the train or the decode step.")
_PROFILE = flags.DEFINE_string(
    "profile", None, "train: START:STOP, the steps to record a trace of."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for several processes off TPU."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds",
    300.0,
    "How long several processes wait for each other at the start, in seconds.",
)
_STEP = flags.DEFINE_string(
    "step", "latest", "evaluate, generate, serve, export-memory: latest, best or a step number."
)
_ACCEPT = flags.DEFINE_list(
    "accept_changes",
    [],
    "Keys or sections of the configuration that may differ from what the run was trained with.",
)
_OUTPUT = flags.DEFINE_string("output", None, "export-memory, count-memory: the file to write.")
_FORMAT = flags.DEFINE_string(
    "format", "", "export-memory: float32, bfloat16 or fp8; default: as the tables are."
)
_TOKENS = flags.DEFINE_integer("tokens", 10_000_000, "count-memory: how many training tokens.")


@command_line.reported
def parse_flags(argv: Sequence[str]) -> list[str]:
    command_line.parse(argv, flags.FLAGS, "config")
    mode, step = _MODE.value, _STEP.value
    if mode not in MODES:
        raise UserError(f"--mode={mode}: must be one of {', '.join(MODES)}")
    if mode == "generate" and _PROMPT.value is None:
        raise UserError("--prompt: missing; generate needs a text to continue")
    try:
        (_PROMPT.value or "").encode()
    except UnicodeEncodeError:  # what the command line gave was not UTF-8: a lone surrogate
        raise UserError(f"--prompt={_PROMPT.value!r}: must be UTF-8 text") from None
    if mode == "compile" and _TOPOLOGY.value is None:
        raise UserError("--topology: missing; for example --topology=v5p:4x4x8")
    if mode in ("export-memory", "count-memory") and not _OUTPUT.value:
        raise UserError("--output: missing; the file to write")
    if _FORMAT.value not in ("", "float32", "bfloat16", "fp8"):
        raise UserError(f"--format={_FORMAT.value}: must be float32, bfloat16 or fp8")
    if _TOKENS.value < 1:
        raise UserError(f"--tokens={_TOKENS.value}: must be at least 1")
    if _PROGRAM.value not in ("train", "decode"):
        raise UserError(f"--program={_PROGRAM.value}: must be train or decode")
    if _PROFILE.value is not None and mode != "train":
        raise UserError(f"--profile={_PROFILE.value}: only --mode=train has steps to record")
    run_settings.check_accepted(_ACCEPT.value)
    if _ACCEPT.value and mode not in OPENS_A_RUN:
        raise UserError(f"--accept_changes: only for --mode={', '.join(OPENS_A_RUN)}")
    if step not in ("latest", "best") and not step.isdecimal():
        raise UserError(f"--step={step}: must be latest, best or a step number")
    return list(argv[:1])


@command_line.reported
def main(argv: Sequence[str]) -> None:
    """Carry out the mode. Imports are local: describing a model must not load the data pipeline."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    config = command_line.config_of(_CONFIG.value, "config")
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    accept = run_settings.check_accepted(_ACCEPT.value)
    if _MODE.value == "describe":
        from engram_jax import describe

        description = describe.describe(config)
        print(json.dumps(description) if _JSON.value else describe.table(description))
        return
    if _MODE.value == "compile":
        from engram_jax import compile_step

        what = config, _TOPOLOGY.value, _PROGRAM.value
        report = compile_step.compile_step(*what)
        if not report["fits"]:
            tell = functools.partial(print, file=sys.stderr, flush=True)
            report["smallest_slice"] = compile_step.smallest_slice(*what, tell)
        print(json.dumps(report) if _JSON.value else compile_step.as_table(report))
        if not report["fits"]:
            sys.exit(1)
        return
    from engram_jax import distributed, same_launch

    distributed.start(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        lambda: same_launch.describe(
            config, _shared_flags() | {"workdir": str(workdir.absolute())}
        ),
        _JOIN_SECONDS.value,
    )
    command_line.keep_compiled_programs(config)
    if _MODE.value == "train":
        from engram_jax import profiling, train

        text = _PROFILE.value
        window = None if text is None else profiling.parse_window(text, config.train.steps)
        train.train(config, workdir, profile=window, accept=accept)
        # A second SIGTERM while the interpreter shuts down does not change the exit status.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    elif _MODE.value == "evaluate":
        from engram_jax import evaluate

        result = evaluate.evaluate(config, workdir, _STEP.value, accept)
        distributed.log(json.dumps(result) if _JSON.value else evaluate.table(result))
    elif _MODE.value == "generate":
        from engram_jax.serve import assemble

        assemble.print_continuation(config, workdir, _STEP.value, _PROMPT.value, accept)
    elif _MODE.value == "serve":
        from engram_jax.serve import assemble

        assemble.serve(config, workdir, _STEP.value, accept)
    elif _MODE.value == "export-memory":
        from engram_jax.serve import export

        what = config, workdir, _STEP.value, Path(_OUTPUT.value), _FORMAT.value
        export.export_memory(*what, distributed.log, accept)
    elif _MODE.value == "count-memory":
        from engram_jax.serve import export

        export.count_memory(config, Path(_OUTPUT.value), _TOKENS.value, distributed.log)


def _shared_flags() -> dict[str, Any]:
    """The flags of this file that every host of a launch must be given alike."""
    own = {flag.name for flag in (_CONFIG, _WORKDIR, _COORDINATOR, _PROCESSES, _PROCESS)}
    own |= {_JOIN_SECONDS.name}
    known = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag(_MODE.name))
    return {f.name: f.value for f in known if "." not in f.name and f.name not in own}


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
