"""What each mode of launch.py does. Its flags: engram_jax/program_flags.py."""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from engram_jax import program_flags as options
from engram_jax.checkpoint import run_settings
from engram_jax.checkpoint.workdir import check_writable
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.config.given_files import check_folder, local_path
from engram_jax.hardware.interrupts import raise_interrupts, tell_when_interrupted
from engram_jax.run import command_line
from engram_jax.run.modes import (
    AFTER_INTERRUPT,
    WITHOUT_PROCESSES,
)

COUNTED = 10_000_000  # training tokens
Accepted = tuple[str, ...]


@command_line.reported
def main(argv: Sequence[str]) -> None:
    """Carry out the mode."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    tell_when_interrupted(AFTER_INTERRUPT[options.MODE.value])
    if options.MODE.value == "report":
        _RUN["report"](Config(), Path(), ())  # of the runs' own configurations nothing is read
        return
    config = command_line.config_of(options.CONFIG.value, "config")
    workdir = local_path("--workdir", options.WORKDIR.value or f"runs/{config.name}")
    command_line.leave_out_absent_tpu()
    if options.MODE.value not in WITHOUT_PROCESSES:
        _join(config, workdir)
        command_line.keep_compiled_programs(config)
    _RUN[options.MODE.value](config, workdir, run_settings.check_accepted(options.ACCEPT.value))


def _join(config: Config, workdir: Path) -> None:
    """Wait for the other processes of this launch, if there are any, and compare settings."""
    from engram_jax.distributed import processes, same_launch

    shared = options.shared_flags() | {"workdir": str(workdir.absolute())}
    processes.join(
        options.COORDINATOR.value,
        options.PROCESSES.value,
        options.PROCESS.value,
        lambda: same_launch.describe_launch(config, shared),
        options.JOIN_SECONDS.value,
    )


# One function per mode. Imports are local: describing a model must not load the data pipeline.


def _train(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.monitoring import profiling
    from engram_jax.run import loop

    text = options.PROFILE.value
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

    if options.NEIGHBOURS.value:
        _evaluate_neighbours(config, workdir)
        return
    if flags.FLAGS[options.TEXTS.name].present:
        check_writable(workdir)  # the result is written there
        found = text_scores.evaluate_texts(
            config, workdir, options.STEP.value, options.TEXTS.value, accept
        )
        shown = json.dumps(json_value(found)) if options.JSON.value else text_scores.table(found)
        processes.log(shown)
        return
    if options.TASKS.value:
        check_writable(workdir)
        scores = tasks.evaluate_tasks(config, workdir, options.STEP.value, accept)
        processes.log(json.dumps(scores) if options.JSON.value else score_table.table(scores))
        return
    result = held_out.evaluate(config, workdir, options.STEP.value, accept)
    processes.log(json.dumps(result) if options.JSON.value else held_out.table(result))


def _evaluate_neighbours(config: Config, workdir: Path) -> None:
    from engram_jax.distributed import processes
    from engram_jax.evaluation import knn_lm, neighbours, rag
    from engram_jax.monitoring.metrics import json_value

    check_writable(workdir)  # the result is written there
    text, step = options.NEIGHBOURS_TEXT.value, options.STEP.value
    if options.NEIGHBOURS.value == options.KNN:
        of_knn = knn_lm.Settings(text, options.KNN_TOKENS.value, options.KNN_INDEX.value)
        result = knn_lm.evaluate_knn(config, workdir, step, of_knn)
    else:
        of_rag = rag.Settings(text, options.RAG_CHUNK.value, options.RAG_PASSAGE.value)
        result = rag.evaluate_rag(config, workdir, step, of_rag)
    neighbours.write_record(workdir, result)
    processes.log(
        json.dumps(json_value(result)) if options.JSON.value else neighbours.table(result)
    )


def _lm_eval(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.hardware.storage import write_text
    from engram_jax.harness import evaluate
    from engram_jax.harness.loading import Asked
    from engram_jax.harness.ruler import RulerAsked

    include = (
        None
        if options.INCLUDE_PATH.value is None
        else local_path("--include_path", options.INCLUDE_PATH.value)
    )
    output = None if options.OUTPUT.value is None else local_path("--output", options.OUTPUT.value)
    if output is not None:
        _writable_folder("output", str(output.parent))
    check_writable(workdir)  # the result is kept there
    given = options.RULER_DATA.value
    data = None if given is None else local_path("--ruler_data", given)
    asked = Asked(
        options.TASKS.value,
        options.NUM_FEWSHOT.value,
        include,
        options.UNSAFE_CODE.value,
        options.LIMIT.value,
        RulerAsked(tuple(map(int, options.RULER_LENGTHS.value)), data),
    )
    found = evaluate.evaluate_tasks(config, workdir, options.STEP.value, asked, accept)
    if not found:  # not process 0
        return
    if output is not None:
        write_text(output, evaluate.as_json(found))
    processes.log(evaluate.as_json(found) if options.JSON.value else evaluate.table(found))
    if found["left_out"] and "paper" not in options.TASKS.value:
        sys.exit(1)


def _long_ppl(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.evaluation import long_ppl
    from engram_jax.monitoring.metrics import json_value

    check_writable(workdir)  # the result is written there
    lengths = (
        options.CONTEXT.value,
        options.TRUNCATED.value,
        options.STRIDE.value,
        int(options.LIMIT.value or 0),
    )
    settings = long_ppl.Settings(tuple(options.TEXTS.value), options.EVALUATOR.value, *lengths)
    found = long_ppl.evaluate_long_ppl(config, workdir, options.STEP.value, settings, accept)
    processes.log(json.dumps(json_value(found)) if options.JSON.value else long_ppl.table(found))


def _report(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.harness import results_page

    output = (
        None if options.OUTPUT.value is None else _writable_folder("output", options.OUTPUT.value)
    )
    print(results_page.report(options.RUNS.value, output, options.JSON.value))


def _analyse(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.monitoring.metrics import json_value
    from engram_jax.run import analyse, analysis_inputs

    given = (
        options.WHAT,
        options.TEXT,
        options.AGAINST,
        options.ENTITIES,
        options.OUTPUT,
        options.NGRAM,
        options.TOKENS,
        options.TEXT_TOKENS,
    )
    settings = analysis_inputs.settings_of({flag.name: flag.value for flag in given})
    result = analyse.analyse(config, workdir, options.STEP.value, settings)
    processes.log(json.dumps(json_value(result)) if options.JSON.value else analyse.summary(result))


def _generate(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.serve import open_engine

    prompt = options.PROMPT.value or ""
    open_engine.print_continuation(config, workdir, options.STEP.value, prompt, accept)


def _serve(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.serve.http import server

    server.serve_checkpoint(config, workdir, options.STEP.value, accept)


def _explore(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.explore import server

    server.explore_checkpoint(
        config, workdir, options.STEP.value, options.TOKENS.value or COUNTED, accept
    )


def _export_memory(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.serve import export_memory

    file = local_path("--output", options.OUTPUT.value or "")
    export_memory.export_memory(
        config, workdir, options.STEP.value, file, options.FORMAT.value, processes.log, accept
    )


def _count_memory(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.distributed import processes
    from engram_jax.serve import export_memory

    file = local_path("--output", options.OUTPUT.value or "")
    export_memory.count_memory(
        config, file, options.TOKENS.value or COUNTED, processes.log, workdir
    )


def _describe(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.model import budgets, describe

    base = None
    if options.BASE.value is not None:
        found = command_line.config_file("--base", options.BASE.value)
        base = budgets.budget_of(command_line.config_of(found, "base"))
    description, budget = describe.describe(config), budgets.budget_of(config)
    if options.JSON.value:
        print(json.dumps(description | {"budget": budgets.as_dict(budget, base)}))
    else:
        print(f"{describe.table(description)}\n\n{budgets.table(budget, base)}")


def _compile(config: Config, workdir: Path, accept: Accepted) -> None:
    from engram_jax.aot import compile_step, predict_report

    topology, program = options.TOPOLOGY.value or "", options.PROGRAM.value
    dump = (
        None
        if options.DUMP_HLO.value is None
        else _writable_folder("dump_hlo", options.DUMP_HLO.value)
    )
    given = options.UNKNOWN.value, options.OVERFLOW.value, options.PAIRS.value
    assumptions = predict_report.assumed_of(config, *given)
    report = compile_step.compile_step(config, topology, program, dump, assumptions)
    if not report["fits"]:
        tell = functools.partial(print, file=sys.stderr, flush=True)
        report["smallest_slice"] = compile_step.smallest_slice(config, topology, program, tell)
    print(json.dumps(report) if options.JSON.value else compile_step.as_table(report))
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
        command_line.given(sys.argv, options.CONFIG.name),
        None if options.WORKDIR.value is None else workdir,
        points=options.POINTS.value,
        seeds=options.SEEDS.value,
        overrides=values,
        override=lambda found: command_line.override(found, values),
        report_only=options.REPORT_ONLY.value,
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


def run() -> None:
    """The program: read the command line, carry out its mode, exit."""
    raise_interrupts()
    app.run(main, flags_parser=options.parse_flags)
