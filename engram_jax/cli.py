"""The flags of launch.py, and what each mode does with them."""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from engram_jax.aot import PROGRAMS, TRAIN
from engram_jax.checkpoint import run_settings
from engram_jax.checkpoint.workdir import check_writable, parse_step
from engram_jax.config import ROW_FORMATS, SECRETS, Config
from engram_jax.config.errors import UserError
from engram_jax.config.extras import require
from engram_jax.config.given_files import check_folder, local_path
from engram_jax.hardware.interrupts import raise_interrupts, tell_when_interrupted
from engram_jax.run import command_line
from engram_jax.run.help_text import asked_for, help_text
from engram_jax.run.modes import (
    AFTER_INTERRUPT,
    MODES,
    MODES_OF_FLAGS,
    NEEDS_SERVE,
    WITHOUT_PROCESSES,
)

KNN, RAG = "knn", "rag"
COUNTED = 10_000_000  # training tokens
Accepted = tuple[str, ...]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file under configs/; default: what the --workdir of a run has stored.",
    sys_argv=command_line.ARGV,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/<config.name>.")
_JSON = flags.DEFINE_bool(
    "json",
    False,
    "describe, evaluate, lm-eval, long-ppl, report, analyse, compile: one JSON object on standard"
    " output.",
)
_BASE = flags.DEFINE_string(
    "base", None, "describe: a configuration file whose budget this one is compared with."
)
_PROMPT = flags.DEFINE_string("prompt", None, "generate: the text to continue.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile: the TPU slice, for example v5p:4x4x8; none needs to be there."
)
_PROGRAM = flags.DEFINE_string(
    "program", TRAIN, "compile: the step of training, or of serving: decode or prefill."
)
_DUMP_HLO = flags.DEFINE_string(
    "dump_hlo", None, "compile: a folder to keep the compiler's text (HLO) of the step in."
)
_UNKNOWN = flags.DEFINE_float(
    "unknown",
    None,
    "compile: how often a loop runs whose trip count is data, for the predicted time; default: as"
    " for balanced experts.",
)
_OVERFLOW = flags.DEFINE_float(
    "overflow",
    0.0,
    "compile: the same for such loops that communicate: further rounds of the row exchange.",
)
_PAIRS = flags.DEFINE_float(
    "pairs",
    0.0,
    "compile: (token, expert) pairs of a device in a grouped product whose buffer is larger, for"
    " the predicted time; 0: the buffer is full.",
)
_TASKS = flags.DEFINE_flag(
    command_line.switch_or_names(
        "tasks",
        "evaluate: on the synthetic tasks of the run's text, not on held-out text. lm-eval: the"
        " tasks, groups and tags, a,b, or paper: the benchmarks of the paper.",
    )
)
_LIMIT = flags.DEFINE_float(
    "limit",
    None,
    "lm-eval: the first so many documents of a task, or a share below 1. long-ppl: the first so"
    " many texts of each name.",
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "lm-eval: examples before a question; default: each task's own."
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "lm-eval: a folder with tasks of your own."
)
_UNSAFE_CODE = flags.DEFINE_bool(
    "confirm_run_unsafe_code",
    False,
    "lm-eval: allow tasks that run code which the model writes. It is not run in a sandbox.",
)
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
    "step",
    "latest",
    "evaluate, lm-eval, long-ppl, analyse, generate, serve, explore, export-memory: latest, best or"
    " a step number.",
)
_ACCEPT = flags.DEFINE_list(
    "accept_changes",
    [],
    "Keys or sections of the configuration that may differ from what the run was trained with.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "export-memory, count-memory: the file to write. analyse: the page, in place of the workdir's."
    " lm-eval: a file for the results, JSON. report: a folder for the page in all its forms.",
)
_FORMAT = flags.DEFINE_string(
    "format", "", "export-memory: float32, bfloat16 or fp8; default: as the tables are."
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "How many training tokens are counted; default: count-memory and explore 10,000,000, analyse"
    " 4,000,000.",
)
_WHAT = flags.DEFINE_list(
    "what",
    [],
    "analyse: some of lens, cka, sensitivity, gates, usage, rows; default: all.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "analyse: a text file for lens, cka and gates, in place of the held-out text."
)
_TEXT_TOKENS = flags.DEFINE_integer(
    "text_tokens",
    None,
    "analyse: at most so many tokens of held-out text, or --text, are read; default: 32,768, and"
    " 16,384 for sensitivity.",
)
_AGAINST = flags.DEFINE_string(
    "against", None, "analyse: the workdir of a second run, whose layers are compared with these."
)
_ENTITIES = flags.DEFINE_string(
    "entities", None, "analyse: a file that labels entities, for cka (docs/analysis.md)."
)
_NGRAM = flags.DEFINE_string(
    "ngram", None, "analyse: a text; what the rows that its last tokens read answer to."
)
_TEXTS = flags.DEFINE_list(
    "texts",
    [],
    "evaluate, long-ppl: the texts to score, NAME=PATH,NAME=PATH, and held_out for the run's own"
    " split (docs/evaluation.md).",
)
_EVALUATOR = flags.DEFINE_string(
    "evaluator",
    "",
    "long-ppl: WORKDIR or WORKDIR@STEP, the checkpoint that says which tokens are key; default: the"
    " scored one.",
)
_CONTEXT = flags.DEFINE_integer(
    "context", 0, "long-ppl: tokens of a text, at most; 0 = the trained length.", lower_bound=0
)
_TRUNCATED = flags.DEFINE_integer(
    "truncated",
    0,
    "long-ppl: tokens of the truncated context; 0 = 4,096, or an eighth of --context if that is"
    " less.",
    lower_bound=0,
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    0,
    "long-ppl: tokens that share a truncated context; 0 = 1,024, or a thirty-second of --context.",
    lower_bound=0,
)
_RUNS = flags.DEFINE_list(
    "runs", [], "report: the checkpoints to put side by side, WORKDIR or WORKDIR@STEP, a,b,c."
)
_POINTS = flags.DEFINE_list(
    "points", [], "sweep: the points to run, for example rho=1,rho=0.8; default: all."
)
_SEEDS = flags.DEFINE_list("seeds", [], "sweep: the seeds to run; default: all.")
_REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "sweep: write the report of what is finished, run nothing."
)
_NEIGHBOURS = flags.DEFINE_enum(
    "neighbours", None, [KNN, RAG], "evaluate: score the model with its training text beside it."
)
_NEIGHBOURS_TEXT = flags.DEFINE_enum(
    "neighbours_text",
    "trained",
    ["trained", "all"],
    "neighbours: what the run was trained on, or the whole training split.",
)
_KNN_TOKENS = flags.DEFINE_integer(
    "knn_tokens", 0, "neighbours=knn: the first so many tokens of it; 0 = all.", lower_bound=0
)
_KNN_INDEX = flags.DEFINE_enum(
    "knn_index", "flat", ["flat", "ivf"], "neighbours=knn: exact search, or an inverted file."
)
_RAG_CHUNK = flags.DEFINE_integer(
    "rag_chunk", 0, "neighbours=rag: tokens scored at a time; 0 = seq_len / 4.", lower_bound=0
)
_RAG_PASSAGE = flags.DEFINE_integer(
    "rag_passage", 0, "neighbours=rag: tokens of a passage; 0 = seq_len / 2.", lower_bound=0
)


@command_line.reported
def parse_flags(argv: Sequence[str]) -> list[str]:
    """Read the flags and refuse, in one line, what does not fit together (absl's parser hook)."""
    if wanted := asked_for(argv):
        print(help_text(flags.FLAGS, _MODE.name, full=wanted == "helpfull"))
        sys.exit(0)
    command_line.parse_command_line(argv, flags.FLAGS, "config")
    mode = _MODE.value
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
    if _FORMAT.value not in ("", *ROW_FORMATS):
        raise UserError(f"--format={_FORMAT.value}: must be {_or(ROW_FORMATS)}")
    for flag in (_TOKENS, _TEXT_TOKENS):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: must be at least 1")
    if _PROGRAM.value not in PROGRAMS:
        raise UserError(f"--program={_PROGRAM.value}: must be {_or(PROGRAMS)}")
    for name, modes in MODES_OF_FLAGS.items():
        if flags.FLAGS[name].present and mode not in modes:
            raise UserError(f"--{name}: only for --mode={', '.join(modes)}")
    if mode != "serve" and (given := SECRETS & command_line.overrides(sys.argv, "config").keys()):
        raise UserError(f"--config.{min(given)}: only for --mode=serve; a run records its command")
    if mode == "report":
        _check_report()
    _check_neighbours()
    _check_tasks()
    run_settings.check_accepted(_ACCEPT.value)
    parse_step(_STEP.value)
    if mode == "sweep":
        require("lab", "--mode=sweep")
        if _COORDINATOR.value is not None:
            raise UserError(
                "--coordinator_address: not for --mode=sweep, which runs one process at a time"
            )
    if mode in NEEDS_SERVE:
        require("serve", f"--mode={mode}")
    if mode == "lm-eval":
        require("eval", f"--mode={mode}")
    return list(argv[:1])


def _check_report() -> None:
    """Refuse what a report reads nothing of."""
    if not _RUNS.value:
        raise UserError("--runs: missing; WORKDIR or WORKDIR@STEP of each checkpoint, a,b,c")
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is not None:
            raise UserError(f"--{flag.name}: not for --mode=report; name the runs in --runs")
    if overridden := command_line.overrides(sys.argv, "config"):
        raise UserError(f"--config.{min(overridden)}: not for --mode=report, which shows results")


def _check_neighbours() -> None:
    """Refuse a neighbour's settings without it, and what neighbours cannot be evaluated with."""
    chosen = _NEIGHBOURS.value
    for flag in (_NEIGHBOURS_TEXT, _KNN_TOKENS, _KNN_INDEX, _RAG_CHUNK, _RAG_PASSAGE):
        wanted = flag.name.split("_")[0]
        if flags.FLAGS[flag.name].present and (
            chosen is None or (wanted in (KNN, RAG) and wanted != chosen)
        ):
            which = f"={wanted}" if wanted in (KNN, RAG) else ""
            raise UserError(f"--{flag.name}: only with --neighbours{which}")
    if chosen and _TASKS.value:
        raise UserError(f"--tasks: not with --neighbours={chosen}, which scores held-out text")
    if chosen and _TEXTS.value:
        raise UserError(f"--texts: not with --neighbours={chosen}, which scores held-out text")
    if _TASKS.value and _TEXTS.value and _MODE.value == "evaluate":
        raise UserError("--texts: not with --tasks, which scores synthetic tasks")
    if chosen and _ACCEPT.value:
        raise UserError("--neighbours: takes the run as it is; leave --accept_changes out")


def _check_tasks() -> None:
    """Refuse tasks without names, or with names that nothing reads, and limits that cut nothing."""
    names, limit, shots = _TASKS.value, _LIMIT.value, _NUM_FEWSHOT.value
    if _MODE.value == "lm-eval":
        if names is True or not names:
            raise UserError("--tasks: missing; names of lm-eval's tasks, a,b, or paper")
    elif names not in (True, False):
        raise UserError(f"--tasks={','.join(names)}: must be --tasks alone for --mode=evaluate")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"--limit={limit:g}: must be a whole number, or above 0 and below 1")
    if _MODE.value == "long-ppl":
        if not _TEXTS.value:
            raise UserError("--texts: missing; NAME=PATH,NAME=PATH or held_out")
        if limit is not None and limit < 1:
            raise UserError(f"--limit={limit:g}: must be a whole number for --mode=long-ppl")
    if shots is not None and shots < 0:
        raise UserError(f"--num_fewshot={shots}: must be at least 0")


@command_line.reported
def main(argv: Sequence[str]) -> None:
    """Carry out the mode."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    tell_when_interrupted(AFTER_INTERRUPT[_MODE.value])
    if _MODE.value == "report":
        _RUN["report"](Config(), Path(), ())  # of the runs' own configurations nothing is read
        return
    config = command_line.config_of(_CONFIG.value, "config")
    workdir = local_path("--workdir", _WORKDIR.value or f"runs/{config.name}")
    command_line.leave_out_absent_tpu()
    if _MODE.value not in WITHOUT_PROCESSES:
        _join(config, workdir)
        command_line.keep_compiled_programs(config)
    _RUN[_MODE.value](config, workdir, run_settings.check_accepted(_ACCEPT.value))


def _join(config: Config, workdir: Path) -> None:
    """Wait for the other processes of this launch, if there are any, and compare settings."""
    from engram_jax.distributed import processes, same_launch

    shared = _shared_flags() | {"workdir": str(workdir.absolute())}
    processes.join(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        lambda: same_launch.describe_launch(config, shared),
        _JOIN_SECONDS.value,
    )


# One function per mode. Imports are local: describing a model must not load the data pipeline.


def _train(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.monitoring import profiling
    from engram_jax.run import loop

    text = _PROFILE.value
    window = None if text is None else profiling.parse_window(text, config.train.steps)
    loop.train(config, workdir, profile=window, accept=accept)
    # A second signal while the interpreter shuts down does not change the exit status.
    for number in (signal.SIGTERM, signal.SIGINT):
        atexit.register(signal.signal, number, signal.SIG_IGN)


def _evaluate(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.evaluation import held_out, tasks, text_scores
    from engram_jax.monitoring.metrics import json_value
    from engram_jax.tasks import score_table

    if _NEIGHBOURS.value:
        _evaluate_neighbours(config, workdir)
        return
    if flags.FLAGS[_TEXTS.name].present:
        check_writable(workdir)  # the result is written there
        found = text_scores.evaluate_texts(config, workdir, _STEP.value, _TEXTS.value, accept)
        shown = json.dumps(json_value(found)) if _JSON.value else text_scores.table(found)
        processes.log(shown)
        return
    if _TASKS.value:
        check_writable(workdir)
        scores = tasks.evaluate_tasks(config, workdir, _STEP.value, accept)
        processes.log(json.dumps(scores) if _JSON.value else score_table.table(scores))
        return
    result = held_out.evaluate(config, workdir, _STEP.value, accept)
    processes.log(json.dumps(result) if _JSON.value else held_out.table(result))


def _evaluate_neighbours(config: Config, workdir: Path) -> None:
    from engram_jax.distributed import processes
    from engram_jax.evaluation import knn_lm, neighbours, rag
    from engram_jax.monitoring.metrics import json_value

    check_writable(workdir)  # the result is written there
    text, step = _NEIGHBOURS_TEXT.value, _STEP.value
    if _NEIGHBOURS.value == KNN:
        of_knn = knn_lm.Settings(text, _KNN_TOKENS.value, _KNN_INDEX.value)
        result = knn_lm.evaluate_knn(config, workdir, step, of_knn)
    else:
        of_rag = rag.Settings(text, _RAG_CHUNK.value, _RAG_PASSAGE.value)
        result = rag.evaluate_rag(config, workdir, step, of_rag)
    neighbours.write_record(workdir, result)
    processes.log(json.dumps(json_value(result)) if _JSON.value else neighbours.table(result))


def _lm_eval(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.hardware.storage import write_text
    from engram_jax.harness import evaluate
    from engram_jax.harness.loading import Asked

    include = (
        None if _INCLUDE_PATH.value is None else local_path("--include_path", _INCLUDE_PATH.value)
    )
    output = None if _OUTPUT.value is None else local_path("--output", _OUTPUT.value)
    if output is not None:
        _writable_folder("output", str(output.parent))
    check_writable(workdir)  # the result is kept there
    asked = Asked(_TASKS.value, _NUM_FEWSHOT.value, include, _UNSAFE_CODE.value, _LIMIT.value)
    found = evaluate.evaluate_tasks(config, workdir, _STEP.value, asked, accept)
    if not found:  # not process 0
        return
    if output is not None:
        write_text(output, evaluate.as_json(found))
    processes.log(evaluate.as_json(found) if _JSON.value else evaluate.table(found))
    if found["left_out"] and "paper" not in _TASKS.value:
        sys.exit(1)


def _long_ppl(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.evaluation import long_ppl
    from engram_jax.monitoring.metrics import json_value

    check_writable(workdir)  # the result is written there
    lengths = _CONTEXT.value, _TRUNCATED.value, _STRIDE.value, int(_LIMIT.value or 0)
    settings = long_ppl.Settings(tuple(_TEXTS.value), _EVALUATOR.value, *lengths)
    found = long_ppl.evaluate_long_ppl(config, workdir, _STEP.value, settings, accept)
    processes.log(json.dumps(json_value(found)) if _JSON.value else long_ppl.table(found))


def _report(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.harness import results_page

    output = None if _OUTPUT.value is None else _writable_folder("output", _OUTPUT.value)
    print(results_page.report(_RUNS.value, output, _JSON.value))


def _analyse(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.monitoring.metrics import json_value
    from engram_jax.run import analyse, analysis_inputs

    given = (_WHAT, _TEXT, _AGAINST, _ENTITIES, _OUTPUT, _NGRAM, _TOKENS, _TEXT_TOKENS)
    settings = analysis_inputs.settings_of({flag.name: flag.value for flag in given})
    result = analyse.analyse(config, workdir, _STEP.value, settings)
    processes.log(json.dumps(json_value(result)) if _JSON.value else analyse.summary(result))


def _generate(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.serve import open_engine

    prompt = _PROMPT.value or ""
    open_engine.print_continuation(config, workdir, _STEP.value, prompt, accept)


def _serve(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.serve.http import server

    server.serve_checkpoint(config, workdir, _STEP.value, accept)


def _explore(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.explore import server

    server.explore_checkpoint(config, workdir, _STEP.value, _TOKENS.value or COUNTED, accept)


def _export_memory(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.serve import export_memory

    file = local_path("--output", _OUTPUT.value or "")
    export_memory.export_memory(
        config, workdir, _STEP.value, file, _FORMAT.value, processes.log, accept
    )


def _count_memory(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.serve import export_memory

    file = local_path("--output", _OUTPUT.value or "")
    export_memory.count_memory(config, file, _TOKENS.value or COUNTED, processes.log, workdir)


def _describe(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.model import budgets, describe

    base = None
    if _BASE.value is not None:
        found = command_line.config_file("--base", _BASE.value)
        base = budgets.budget_of(command_line.config_of(found, "base"))
    description, budget = describe.describe(config), budgets.budget_of(config)
    if _JSON.value:
        print(json.dumps(description | {"budget": budgets.as_dict(budget, base)}))
    else:
        print(f"{describe.table(description)}\n\n{budgets.table(budget, base)}")


def _compile(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.aot import compile_step, predict_report

    topology, program = _TOPOLOGY.value or "", _PROGRAM.value
    dump = None if _DUMP_HLO.value is None else _writable_folder("dump_hlo", _DUMP_HLO.value)
    given = _UNKNOWN.value, _OVERFLOW.value, _PAIRS.value
    assumptions = predict_report.assumed_of(config, *given)
    report = compile_step.compile_step(config, topology, program, dump, assumptions)
    if not report["fits"]:
        tell = functools.partial(print, file=sys.stderr, flush=True)
        report["smallest_slice"] = compile_step.smallest_slice(config, topology, program, tell)
    print(json.dumps(report) if _JSON.value else compile_step.as_table(report))
    if not report["fits"]:
        sys.exit(1)


def _writable_folder(flag: str, value: str) -> Path:
    """The folder that a flag names, there or to be made: told before minutes of work, not after."""
    if not value:
        raise UserError(f"--{flag}=: has no value, a folder")
    try:
        folder = local_path(f"--{flag}", value)
        check_folder(folder)
        return folder
    except OSError as error:
        raise UserError(f"--{flag}={value}: cannot be written to: {error.strerror}") from error


def _sweep(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.lab import sweep

    values = command_line.overrides(sys.argv, "config")
    done = sweep.run_sweep(
        command_line.given(sys.argv, _CONFIG.name),
        None if _WORKDIR.value is None else workdir,
        points=_POINTS.value,
        seeds=_SEEDS.value,
        overrides=values,
        override=lambda found: command_line.override(found, values),
        report_only=_REPORT_ONLY.value,
    )
    if not done:
        sys.exit(1)


_RUN: dict[str, Callable[[Config, Path, Accepted], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "lm-eval": _lm_eval,
    "long-ppl": _long_ppl,
    "report": _report,
    "analyse": _analyse,
    "generate": _generate,
    "serve": _serve,
    "explore": _explore,
    "export-memory": _export_memory,
    "count-memory": _count_memory,
    "describe": _describe,
    "compile": _compile,
    "sweep": _sweep,
}
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _shared_flags() -> dict[str, Any]:
    """The flags of this file that every host of a launch must be given alike."""
    own = {flag.name for flag in (_CONFIG, _WORKDIR, _COORDINATOR, _PROCESSES, _PROCESS)}
    own |= {_JOIN_SECONDS.name}
    known = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag(_MODE.name))
    return {f.name: f.value for f in known if "." not in f.name and f.name not in own}


def run() -> None:
    """The program: read the command line, carry out its mode, exit."""
    raise_interrupts()
    app.run(main, flags_parser=parse_flags)
