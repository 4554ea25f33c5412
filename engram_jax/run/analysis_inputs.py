"""What --mode=analyse is given: its settings, checked, and the runs and texts that they name.

A run is opened by its weights alone, without an optimizer's moments, and a text is read a few
sequences at a time: what is held beside the weights does not grow with either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from engram_jax.addressing import tokenizer_fingerprint
from engram_jax.analysis.depth import Variables
from engram_jax.analysis.texts import batch_shape, with_batches
from engram_jax.checkpoint.load_model import LoadedModel, load_model
from engram_jax.checkpoint.run_record import get_config
from engram_jax.checkpoint.run_settings import check_text
from engram_jax.checkpoint.table_order import as_stored
from engram_jax.config import SCONE, Config, parse_config
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import local_path
from engram_jax.data.run_data import RunData, open_data
from engram_jax.distributed import processes
from engram_jax.evaluation.held_out import check_held_out, check_scored_tokenizer
from engram_jax.memory.table import Table
from engram_jax.model.program import Program, check_decodes

LENS, CKA, SENSITIVITY, GATES, USAGE, ROWS = "lens", "cka", "sensitivity", "gates", "usage", "rows"
WHAT = {
    LENS: "KL of every layer's prediction to the last one's",
    CKA: "similarity of layers at the ends of entities",
    SENSITIVITY: "losses with parts of the memory off",
    GATES: "gates on a text",
    USAGE: "rows read, shared and never read; losses by frequency",
    ROWS: "n-grams that read a row, and rows like it",
}
OF_MEMORY = (SENSITIVITY, GATES, USAGE, ROWS)
OF_HASHES = (SENSITIVITY, USAGE, ROWS)  # need n-grams that stand for rows


class NothingToAnalyseError(UserError):
    """The text has nothing for an analysis: an error where it was asked for by name."""


@dataclass(frozen=True)
class Settings:
    """What is analysed, and over which text.

    what: keys of WHAT; () = all that the model has. text: a file in place of the held-out text, for
    lens, cka and gates. against: the workdir of another run, for lens and cka. entities: a labelled
    file, for cka. ngram: a text whose last tokens' rows are shown. tokens: of training text whose
    n-grams are counted, at most; text_tokens: of held-out text or `text`, at most (None:
    run/analyses.py: TEXT_TOKENS). output: the page
    to write, None = in the workdir.
    """

    what: tuple[str, ...] = ()
    text: Path | None = None
    against: Path | None = None
    entities: Path | None = None
    ngram: str = ""
    tokens: int = 4_000_000
    text_tokens: int | None = None
    output: Path | None = None


@dataclass
class Subject:
    """A checkpoint that is analysed: its program for batches of the analysis, its variables as
    training has them, and what was loaded (without its weights)."""

    program: Program
    variables: Variables
    loaded: LoadedModel


@dataclass
class Given:
    """What the analyses read. data: of the run, None where only given texts are read. cache: what
    several of them share."""

    settings: Settings
    model: Subject
    other: Subject | None
    data: RunData | None
    workdir: Path
    tell: Callable[[str], None]
    cache: dict[str, Any] = field(default_factory=dict)


def settings_of(values: dict[str, Any]) -> Settings:
    """Of the program's flags by name."""
    given: dict[str, Any] = {
        name: local_path(f"--{name}", values[name])
        for name in ("text", "against", "entities", "output")
        if values[name]
    }
    given |= {k: values[k] for k in ("ngram", "tokens", "text_tokens") if values[k] is not None}
    return Settings(what=tuple(name.strip() for name in values["what"]), **given)


def check_settings(config: Config, settings: Settings) -> tuple[str, ...]:
    """The analyses to make, in the order of WHAT. Raises UserError for what does not fit."""
    if jax.process_count() > 1:
        raise UserError(f"--mode=analyse: runs in one process, not in {jax.process_count()}")
    for name in settings.what:
        if name not in WHAT:
            raise UserError(f"--what={shown(name)}: must be among {', '.join(WHAT)}")
    serve, engram = config.serve, config.model.engram
    what = settings.what or tuple(
        name for name in WHAT if name not in OF_MEMORY or _has(config, name) is None
    )
    for name in what:
        if missing := _has(config, name):
            raise UserError(f"--what={name}: {missing}")
    off = [k for k in ("off_layers", "off_orders") if getattr(serve, k)]
    if off and set(what) & {*OF_MEMORY}:
        raise UserError(
            f"config.serve.{off[0]} = {getattr(serve, off[0])}: only with --what=lens,cka; the"
            " analyses of a memory have it on, and switch parts off themselves"
        )
    if engram.layers:
        check_decodes(config)
    used = {
        "text": (settings.text, (LENS, CKA, GATES)),
        "against": (settings.against, (LENS, CKA)),
        "entities": (settings.entities, (CKA,)),
        "ngram": (settings.ngram, (ROWS,)),
    }
    for flag, (value, by) in used.items():
        if value and not set(what) & set(by):
            raise UserError(f"--{flag}: only for --what={', '.join(by)}")
    if settings.output is not None and settings.output.suffix != ".html":
        raise UserError(f"--output={shown(settings.output)}: must end in .html; JSON is beside it")
    return tuple(name for name in WHAT if name in what)


def _has(config: Config, name: str) -> str | None:
    """Why a model has nothing for an analysis; None if it has."""
    engram = config.model.engram
    if name not in OF_MEMORY:
        return None
    if not engram.layers:
        return "config.model.engram.layers = (): the model has no Engram layer"
    if name in OF_HASHES and engram.form == SCONE:
        return f"config.model.engram.form = {SCONE!r}: its rows stand for no hash"
    if name == GATES and not engram.gated:
        return "the model's Engram layers have no gate"
    return None


def open_given(
    config: Config,
    workdir: Path,
    step: str,
    settings: Settings,
    what: Sequence[str],
    tell: Callable[[str], None],
) -> Given:
    """The run, the one beside it, and its text if some analysis reads it."""
    loaded = load_model(config, workdir, step, tell=tell)
    other = None
    if settings.against is not None:
        other = _load_other(config, settings.against, step, loaded, tell)
    models = [m for m in (loaded, other) if m is not None]
    length = min(m.seq_len for m in models)
    shapes = [batch_shape(m.program.config, m.program.axes.batch, length) for m in models]
    size, length = min(b for b, _ in shapes), min(t for _, t in shapes)
    subjects = [_subject(m, size, length) for m in models]
    given = Given(settings, subjects[0], subjects[-1] if other else None, None, workdir, tell)
    if needs_data(settings, what):
        tell("reading the run's text")
        data = open_data(config, log=lambda line: None, count_fgrams=False)
        check_scored_tokenizer(workdir, data)
        check_text(workdir, loaded.trained_on, data.prepared.fingerprint, ())
        data = dataclasses.replace(data, addressing=subjects[0].program.addressing)
        check_held_out(data)
        given.data = data
    return given


def needs_data(settings: Settings, what: Sequence[str]) -> bool:
    """Whether an analysis reads the run's own text."""
    if set(what) & {SENSITIVITY, USAGE, ROWS}:
        return True
    by_text = set(what) - ({CKA} if settings.entities else set())
    return bool(by_text) and settings.text is None


def _load_other(
    config: Config, against: Path, step: str, first: LoadedModel, tell: Callable[[str], None]
) -> LoadedModel:
    """The run that the first is compared with, on its mesh. Raises UserError for another tokenizer:
    the layers would not see the same tokens."""
    other = parse_config(get_config(f"{step}:{against}"))
    serve = dataclasses.replace(other.serve, ema=config.serve.ema)
    other = dataclasses.replace(other, mesh=config.mesh, serve=serve)
    if other.model.engram.layers:
        check_decodes(other)
    found = load_model(other, against, step, tell=tell)
    mine, theirs = (tokenizer_fingerprint(m.tokenizer) for m in (first, found))
    if mine != theirs:
        raise UserError(
            f"--against={shown(against)}: its tokenizer ({theirs[:12]}) is not the run's"
            f" ({mine[:12]}); layers are compared at the same tokens"
        )
    if first.trained_on != found.trained_on:
        processes.warn(
            f"--against={shown(against)}: was trained on another text than the run; what is held"
            " out here may be among it"
        )
    return found


def _subject(loaded: LoadedModel, size: int, length: int) -> Subject:
    program, weights = with_batches(loaded.program, size, length), loaded.weights
    rows = as_stored(program, dict(weights.rows))
    memory = {layer: Table(table, None, None) for layer, table in rows.items()}
    without = dataclasses.replace(loaded, weights=dataclasses.replace(weights, rows={}))
    return Subject(program, (weights.params, weights.router_bias, memory), without)
