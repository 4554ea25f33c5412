"""--mode=lm-eval: a checkpoint scored by lm-evaluation-harness, in this process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import handle_non_serializable, make_table

from engram_jax.addressing import load_tokenizer
from engram_jax.checkpoint.results import LM_EVAL, write_result
from engram_jax.checkpoint.run_settings import check_opened
from engram_jax.checkpoint.workdir import TOKENIZER
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree
from engram_jax.evaluation.text_scores import of_switches
from engram_jax.harness.lm import EngineLM
from engram_jax.harness.loading import Asked, Loaded, load_tasks
from engram_jax.harness.ruler import Reads
from engram_jax.harness.scorer import Scorer
from engram_jax.monitoring.metrics import json_value
from engram_jax.serve.engine import Engine
from engram_jax.serve.open_engine import check_memory, load_for, make_engine

Warn = Callable[[str], None]
# Of lm-eval's results: by task or group. Samples are left out: they are as large as the data.
_BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot"),
    *("higher_is_better", "n-samples"),
)


def evaluate_tasks(
    config: Config, workdir: Path, step: str, asked: Asked, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """Score a checkpoint on tasks. Every process calls it; process 0 alone has the result: what
    lm-eval tells by task and group, the checkpoint's name, what the evaluation was asked for
    ("config"), "left_out": name -> why, and of RULER's prompts how many there are and where their
    texts are from ("ruler").

    The result is also written below `workdir` (checkpoint/results.py).

    accept: as in `open_engine`. Raises UserError if none of the tasks can be run, or for a
    checkpoint that does not fit.
    """
    tell = processes.stages(sys.stderr)  # standard output is the result
    check_memory(config, config.serve.capacity or config.data.seq_len)
    agree(lambda: check_opened(config, workdir, step, accept))  # before minutes of reading
    tell("reading the tasks and their data")

    def reads() -> Reads:
        special = config.serve.parse_special
        tokenizer = load_tokenizer(workdir / TOKENIZER, parse_special=special)
        return Reads(tokenizer, config.serve.capacity or config.data.seq_len)

    loaded, missing = agree(lambda: _load(asked, reads, tell))
    trained = load_for(config, workdir, step, accept, tell)
    engine = make_engine(trained, config.serve, tell=tell)
    try:
        found = run(engine, trained.eos_id, loaded, missing, asked, tell, processes.warn)
    finally:
        engine.close()
    if jax.process_index() > 0:
        return {}
    found = found | {"checkpoint": trained.name}
    wanted = {"tasks": list(asked.tasks), "limit": asked.limit, "num_fewshot": asked.shots}
    if accept:
        wanted["changed_settings"] = list(accept)
    kept = write_result(
        workdir, LM_EVAL, trained, wanted | of_switches(config), json.loads(as_json(found))
    )
    tell(f"kept in {kept}")
    return found


def _load(
    asked: Asked, reads: Callable[[], Reads], tell: Warn
) -> tuple[list[Loaded], dict[str, str]]:
    if jax.process_index() > 0:
        return [], {}
    loaded, missing = load_tasks(asked, reads, processes.warn, tell)
    for name, why in missing.items():
        processes.warn(f"{name}: left out: {why}")
    if not loaded:
        raise UserError(f"--tasks: none of the {len(missing)} can be run; the lines above say why")
    return loaded, missing


def run(
    engine: Engine,
    eos_id: int,
    loaded: Sequence[Loaded],
    missing: Mapping[str, str],
    asked: Asked,
    tell: Warn = lambda line: None,
    warn: Warn = lambda line: None,
) -> dict[str, Any]:
    """Score an engine on loaded tasks; the result without the checkpoint's name, {} on the other
    processes. tell, warn: are given lines for the user."""
    scorer = Scorer(engine)
    if jax.process_index() > 0:
        scorer.follow()
        return {}
    model = EngineLM(scorer, engine.tokenizer, eos_id, warn)
    merged: dict[str, Any] = {key: {} for key in _BY_TASK}
    left = dict(missing)
    settings: dict[str, Any] = {}
    for one in loaded:
        tell(f"{one.name}")
        try:
            found = _score(model, one, asked, warn)
        except UserError as error:  # it asks for what the model cannot do; the others go on
            left[one.name] = str(error)
            warn(f"{one.name}: left out: {error}")
            continue
        settings = found["config"]
        for key in _BY_TASK:
            merged[key] |= found.get(key) or {}
        if one.about:
            before = merged.setdefault("ruler", one.about)
            before["documents"] |= one.about["documents"]
    scorer.release()
    if not merged["results"]:
        raise UserError(f"--tasks: none of the {len(left)} could be run; the lines above say why")
    return merged | {
        "config": {
            "model": "engram_jax",
            "limit": asked.limit,
            "max_length": model.max_length,
            **{key: settings[key] for key in settings if key.endswith("seed")},
        },
        "lm_eval_version": version("lm_eval"),
        "left_out": left,
    }


def _score(model: LM, one: Loaded, asked: Asked, warn: Warn) -> dict[str, Any]:
    fixed = [
        task.task_name
        for item in one.items
        for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])
        if task.get_config("num_fewshot") == 0
    ]
    if one.shots and fixed:
        warn(f"{one.name}: has no examples in {len(fixed)} of its tasks, whatever is asked for")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    limit = one.limit
    with _as_this_program_is():
        found = simple_evaluate(
            model=model,
            tasks=one.items,
            task_manager=one.manager,
            num_fewshot=one.shots,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            log_samples=False,
            confirm_run_unsafe_code=asked.unsafe,
        )
    assert found is not None  # as on processes other than 0
    return found


@contextlib.contextmanager
def _as_this_program_is() -> Iterator[None]:
    """What lm-eval prints goes to standard error, and for its standard errors it starts no
    processes: they would be forks of one with many threads, which may hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def table(found: Mapping[str, Any]) -> str:
    """The tables that lm-eval prints, and where RULER's texts are from."""
    parts = [make_table(found)]
    if found["groups"]:
        parts.append(make_table(found, "groups"))
    sources = found.get("ruler", {}).get("data", {})
    parts += [f"RULER's {name}: {about['source']}" for name, about in sources.items()]
    return "\n".join(part.rstrip("\n") for part in parts)


def as_json(found: Mapping[str, Any]) -> str:
    """The result as one JSON object; functions in a task's configuration are their names, numbers
    that are not finite texts ("Infinity")."""
    plain = json.loads(json.dumps(found, default=handle_non_serializable))
    return json.dumps(json_value(plain))
