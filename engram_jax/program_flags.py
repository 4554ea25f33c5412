"""The flags of launch.py, and what does not fit together among them.

Which modes read a flag stands in engram_jax/run/modes.py, what a mode does in engram_jax/cli.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from engram_jax.aot import PROGRAMS, TRAIN
from engram_jax.checkpoint import run_settings
from engram_jax.checkpoint.workdir import parse_step
from engram_jax.config import ROW_FORMATS, SECRETS
from engram_jax.config.errors import UserError, shown
from engram_jax.config.extras import require
from engram_jax.run import command_line
from engram_jax.run.help_text import asked_for, help_text
from engram_jax.run.modes import MODES, MODES_OF_FLAGS, NEEDS_SERVE

KNN, RAG = "knn", "rag"

MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file under configs/; default: what the --workdir of a run has stored.",
    sys_argv=command_line.ARGV,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/<config.name>.")
JSON = flags.DEFINE_bool(
    "json",
    False,
    "describe, evaluate, lm-eval, long-ppl, report, analyse, compile: one JSON object on standard"
    " output.",
)
BASE = flags.DEFINE_string(
    "base", None, "describe: a configuration file whose budget this one is compared with."
)
PROMPT = flags.DEFINE_string("prompt", None, "generate: the text to continue.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile: the TPU slice, for example v5p:4x4x8; none needs to be there."
)
PROGRAM = flags.DEFINE_string(
    "program", TRAIN, "compile: the step of training, or of serving: decode or prefill."
)
DUMP_HLO = flags.DEFINE_string(
    "dump_hlo", None, "compile: a folder to keep the compiler's text (HLO) of the step in."
)
UNKNOWN = flags.DEFINE_float(
    "unknown",
    None,
    "compile: how often a loop runs whose trip count is data, for the predicted time; default: as"
    " for balanced experts.",
)
OVERFLOW = flags.DEFINE_float(
    "overflow",
    0.0,
    "compile: the same for such loops that communicate: further rounds of the row exchange.",
)
PAIRS = flags.DEFINE_float(
    "pairs",
    0.0,
    "compile: (token, expert) pairs of a device in a grouped product whose buffer is larger, for"
    " the predicted time; 0: the buffer is full.",
)
TASKS = flags.DEFINE_flag(
    command_line.switch_or_names(
        "tasks",
        "evaluate: on the synthetic tasks of the run's text, not on held-out text. lm-eval: the"
        " tasks, groups and tags, a,b, or paper: the benchmarks of the paper.",
    )
)
LIMIT = flags.DEFINE_float(
    "limit",
    None,
    "lm-eval: the first so many documents of a task, or a share below 1. long-ppl: the first so"
    " many texts of each name.",
)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "lm-eval: examples before a question; default: each task's own."
)
INCLUDE_PATH = flags.DEFINE_string(
    "include_path", None, "lm-eval: a folder with tasks of your own."
)
RULER_LENGTHS = flags.DEFINE_list(
    "ruler_lengths", [], "lm-eval: tokens of RULER's prompts, 4096,8192; default: 4096."
)
RULER_DATA = flags.DEFINE_string(
    "ruler_data",
    None,
    "lm-eval: a folder with what RULER's tasks would download (docs/lm_eval.md).",
)
UNSAFE_CODE = flags.DEFINE_bool(
    "confirm_run_unsafe_code",
    False,
    "lm-eval: allow tasks that run code which the model writes. It is not run in a sandbox.",
)
PROFILE = flags.DEFINE_string("profile", None, "train: START:STOP, the steps to record a trace of.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for several processes off TPU."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds",
    300.0,
    "How long several processes wait for each other at the start, in seconds.",
)
STEP = flags.DEFINE_string(
    "step",
    "latest",
    "evaluate, lm-eval, long-ppl, analyse, generate, serve, explore, export-memory: latest, best or"
    " a step number.",
)
ACCEPT = flags.DEFINE_list(
    "accept_changes",
    [],
    "Keys or sections of the configuration that may differ from what the run was trained with.",
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "export-memory, count-memory: the file to write. analyse: the page, in place of the workdir's."
    " lm-eval: a file for the results, JSON. report: a folder for the page in all its forms.",
)
FORMAT = flags.DEFINE_string(
    "format", "", "export-memory: float32, bfloat16 or fp8; default: as the tables are."
)
TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "How many training tokens are counted; default: count-memory and explore 10,000,000, analyse"
    " 4,000,000.",
)
WHAT = flags.DEFINE_list(
    "what",
    [],
    "analyse: some of lens, cka, sensitivity, gates, usage, rows; default: all.",
)
TEXT = flags.DEFINE_string(
    "text", None, "analyse: a text file for lens, cka and gates, in place of the held-out text."
)
TEXT_TOKENS = flags.DEFINE_integer(
    "text_tokens",
    None,
    "analyse: at most so many tokens of held-out text, or --text, are read; default: 32,768, and"
    " 16,384 for sensitivity.",
)
AGAINST = flags.DEFINE_string(
    "against", None, "analyse: the workdir of a second run, whose layers are compared with these."
)
ENTITIES = flags.DEFINE_string(
    "entities", None, "analyse: a file that labels entities, for cka (docs/analysis.md)."
)
NGRAM = flags.DEFINE_string(
    "ngram", None, "analyse: a text; what the rows that its last tokens read answer to."
)
TEXTS = flags.DEFINE_list(
    "texts",
    [],
    "evaluate, long-ppl: the texts to score, NAME=PATH,NAME=PATH, and held_out for the run's own"
    " split (docs/evaluation.md).",
)
EVALUATOR = flags.DEFINE_string(
    "evaluator",
    "",
    "long-ppl: WORKDIR or WORKDIR@STEP, the checkpoint that says which tokens are key; default: the"
    " scored one.",
)
CONTEXT = flags.DEFINE_integer(
    "context", 0, "long-ppl: tokens of a text, at most; 0 = the trained length.", lower_bound=0
)
TRUNCATED = flags.DEFINE_integer(
    "truncated",
    0,
    "long-ppl: tokens of the truncated context; 0 = 4,096, or an eighth of --context if that is"
    " less.",
    lower_bound=0,
)
STRIDE = flags.DEFINE_integer(
    "stride",
    0,
    "long-ppl: tokens that share a truncated context; 0 = 1,024, or a thirty-second of --context.",
    lower_bound=0,
)
RUNS = flags.DEFINE_list(
    "runs", [], "report: the checkpoints to put side by side, WORKDIR or WORKDIR@STEP, a,b,c."
)
POINTS = flags.DEFINE_list(
    "points", [], "sweep: the points to run, for example rho=1,rho=0.8; default: all."
)
SEEDS = flags.DEFINE_list("seeds", [], "sweep: the seeds to run; default: all.")
REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "sweep: write the report of what is finished, run nothing."
)
NEIGHBOURS = flags.DEFINE_enum(
    "neighbours", None, [KNN, RAG], "evaluate: score the model with its training text beside it."
)
NEIGHBOURS_TEXT = flags.DEFINE_enum(
    "neighbours_text",
    "trained",
    ["trained", "all"],
    "neighbours: what the run was trained on, or the whole training split.",
)
KNN_TOKENS = flags.DEFINE_integer(
    "knn_tokens", 0, "neighbours=knn: the first so many tokens of it; 0 = all.", lower_bound=0
)
KNN_INDEX = flags.DEFINE_enum(
    "knn_index", "flat", ["flat", "ivf"], "neighbours=knn: exact search, or an inverted file."
)
RAG_CHUNK = flags.DEFINE_integer(
    "rag_chunk", 0, "neighbours=rag: tokens scored at a time; 0 = seq_len / 4.", lower_bound=0
)
RAG_PASSAGE = flags.DEFINE_integer(
    "rag_passage", 0, "neighbours=rag: tokens of a passage; 0 = seq_len / 2.", lower_bound=0
)


@command_line.reported
def parse_flags(argv: Sequence[str]) -> list[str]:
    """Read the flags and refuse, in one line, what does not fit together (absl's parser hook)."""
    if wanted := asked_for(argv):
        print(help_text(flags.FLAGS, MODE.name, full=wanted == "helpfull"))
        sys.exit(0)
    command_line.parse_command_line(argv, flags.FLAGS, "config")
    mode = MODE.value
    if mode not in MODES:
        raise UserError(f"--mode={mode}: must be one of {', '.join(MODES)}")
    if mode == "generate" and PROMPT.value is None:
        raise UserError("--prompt: missing; generate needs a text to continue")
    try:
        (PROMPT.value or "").encode()
    except UnicodeEncodeError:  # what the command line gave was not UTF-8: a lone surrogate
        raise UserError(f"--prompt={PROMPT.value!r}: must be UTF-8 text") from None
    if mode == "compile" and TOPOLOGY.value is None:
        raise UserError("--topology: missing; for example --topology=v5p:4x4x8")
    if mode in ("export-memory", "count-memory") and not OUTPUT.value:
        raise UserError("--output: missing; the file to write")
    if FORMAT.value not in ("", *ROW_FORMATS):
        raise UserError(f"--format={FORMAT.value}: must be {_or(ROW_FORMATS)}")
    for flag in (TOKENS, TEXT_TOKENS):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: must be at least 1")
    if PROGRAM.value not in PROGRAMS:
        raise UserError(f"--program={PROGRAM.value}: must be {_or(PROGRAMS)}")
    for name, modes in MODES_OF_FLAGS.items():
        if flags.FLAGS[name].present and mode not in modes:
            raise UserError(f"--{name}: only for --mode={', '.join(modes)}")
    if mode != "serve" and (given := SECRETS & command_line.overrides(sys.argv, "config").keys()):
        raise UserError(f"--config.{min(given)}: only for --mode=serve; a run records its command")
    if mode == "report":
        _check_report()
    _check_neighbours()
    _check_tasks()
    run_settings.check_accepted(ACCEPT.value)
    parse_step(STEP.value)
    if mode == "sweep":
        require("lab", "--mode=sweep")
        if COORDINATOR.value is not None:
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
    if not RUNS.value:
        raise UserError("--runs: missing; WORKDIR or WORKDIR@STEP of each checkpoint, a,b,c")
    for flag in (CONFIG, WORKDIR):
        if flag.value is not None:
            raise UserError(f"--{flag.name}: not for --mode=report; name the runs in --runs")
    if overridden := command_line.overrides(sys.argv, "config"):
        raise UserError(f"--config.{min(overridden)}: not for --mode=report, which shows results")


def _check_neighbours() -> None:
    """Refuse a neighbour's settings without it, and what neighbours cannot be evaluated with."""
    chosen = NEIGHBOURS.value
    for flag in (NEIGHBOURS_TEXT, KNN_TOKENS, KNN_INDEX, RAG_CHUNK, RAG_PASSAGE):
        wanted = flag.name.split("_")[0]
        if flags.FLAGS[flag.name].present and (
            chosen is None or (wanted in (KNN, RAG) and wanted != chosen)
        ):
            which = f"={wanted}" if wanted in (KNN, RAG) else ""
            raise UserError(f"--{flag.name}: only with --neighbours{which}")
    if chosen and TASKS.value:
        raise UserError(f"--tasks: not with --neighbours={chosen}, which scores held-out text")
    if chosen and TEXTS.value:
        raise UserError(f"--texts: not with --neighbours={chosen}, which scores held-out text")
    if TASKS.value and TEXTS.value and MODE.value == "evaluate":
        raise UserError("--texts: not with --tasks, which scores synthetic tasks")
    if chosen and ACCEPT.value:
        raise UserError("--neighbours: takes the run as it is; leave --accept_changes out")


def _check_tasks() -> None:
    """Refuse tasks without names, or with names that nothing reads, and limits that cut nothing."""
    names, limit, shots = TASKS.value, LIMIT.value, NUM_FEWSHOT.value
    if MODE.value == "lm-eval":
        if names is True or not names:
            raise UserError("--tasks: missing; names of lm-eval's tasks, a,b, or paper")
    elif names not in (True, False):
        raise UserError(f"--tasks={','.join(names)}: must be --tasks alone for --mode=evaluate")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"--limit={limit:g}: must be a whole number, or above 0 and below 1")
    if MODE.value == "long-ppl":
        if not TEXTS.value:
            raise UserError("--texts: missing; NAME=PATH,NAME=PATH or held_out")
        if limit is not None and limit < 1:
            raise UserError(f"--limit={limit:g}: must be a whole number for --mode=long-ppl")
    if shots is not None and shots < 0:
        raise UserError(f"--num_fewshot={shots}: must be at least 0")
    lengths = RULER_LENGTHS.value
    whole = all(re.fullmatch(r"[1-9][0-9]{0,8}", text) for text in lengths)
    if not whole or len(set(lengths)) != len(lengths):
        text = shown(",".join(lengths))
        raise UserError(f"--ruler_lengths={text}: must be different whole numbers, 4096,8192")


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def shared_flags() -> dict[str, Any]:
    """The flags of this file that every host of a launch must be given alike."""
    own = {flag.name for flag in (CONFIG, WORKDIR, COORDINATOR, PROCESSES, PROCESS)}
    own |= {JOIN_SECONDS.name}
    known = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag(MODE.name))
    return {f.name: f.value for f in known if "." not in f.name and f.name not in own}
