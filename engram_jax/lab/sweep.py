"""--mode=sweep: an experiment file, run to the end and reported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from engram_jax.checkpoint.workdir import check_writable
from engram_jax.config.errors import UserError
from engram_jax.lab.experiment import Experiment
from engram_jax.lab.plan import Plan, part
from engram_jax.lab.report import write_report
from engram_jax.lab.runner import Sweep
from engram_jax.lab.status import Screen, all_of, rates, summary

KEPT = (
    "the runs that are finished are kept, the one under way goes on from its last checkpoint: the"
    " same command goes on"
)

# Keys that a sweep sets for each of its runs, and what does so.
_SET = {
    "name": "which names its runs",
    "train.seed": "whose seeds are named by --seeds",
    "data.seed": "whose seeds are named by --seeds",
    "optimizer.peak_lr": "which tries the experiment's learning rates",
}


def run_sweep(
    file: str,
    folder: Path | None,
    *,
    points: Sequence[str] = (),
    seeds: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    override: Callable[[ConfigDict], None] = lambda config: None,
    report_only: bool = False,
) -> bool:
    """Run the experiment that `file` declares; whether all that was asked for is done.

    folder: where its runs live; None: runs/NAME. points, seeds: names of those to run, empty: all.
    overrides: keys of the configuration with what the command line set them to; override: applies
    them. report_only: run nothing.

    Raises UserError for a file that declares no experiment, for a point that it does not have, for
    an override that `check_overrides` refuses, and for a configuration that is not valid: of every
    run, before the first is started.
    """
    experiment = load_experiment(file)
    folder = folder or Path("runs") / experiment.name
    check_writable(folder)
    plan = part(experiment, folder, points, seeds, override)
    check_overrides(plan, overrides or {})
    screen = Screen()
    sweep = Sweep(
        plan,
        program(),
        file,
        dict(overrides or {}),
        show=screen.show,
        finished=lambda: write_report(plan.whole()),
    )
    plan.base()
    for launch in all_of(sweep):
        plan.config(launch)
    if report_only:
        return _report(plan.whole())
    done = sweep.run()
    print(f"{rates(sweep)}; {summary(sweep)}")
    if sweep.stopping:
        print(f"stopped; {KEPT}")
    _report(plan.whole())
    return done


def load_experiment(file: str) -> Experiment:
    """The EXPERIMENT of a configuration file."""
    path, colon, argument = file.partition(":")
    if colon:
        raise UserError(
            f"--config={file}: a sweep takes the file alone; its points are named by --points and"
            f" --seeds, not by :{argument}"
        )
    found = runpy.run_path(path).get("EXPERIMENT")
    if not isinstance(found, Experiment):
        raise UserError(
            f"--config={path}: declares no EXPERIMENT; for example"
            " configs/experiments/allocation.py"
        )
    return found


def check_overrides(plan: Plan, overrides: Mapping[str, str]) -> None:
    """Raises UserError for keys that the sweep itself sets, and for those of the model's size: they
    would be changed after seed, learning rate and budget have been settled."""
    for key, value in overrides.items():
        flag = f"--config.{key}={value}: not for --mode=sweep, "
        if key in _SET:
            raise UserError(f"{flag}{_SET[key]}")
        if key == "tokenizer.vocab_size" or key.startswith("model."):
            raise UserError(
                f"{flag}whose sizes are solved for equal budgets before it; change them in the"
                " experiment's file"
            )
        settings = {repr(_value(plan.experiment.config(p.name), key)) for p in plan.points}
        if len(settings) > 1:
            raise UserError(f"{flag}whose points differ in it; change it in the experiment's file")


def _value(config: ConfigDict, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def program() -> list[str]:
    """How this program was started, without its flags."""
    main = Path(sys.argv[0])
    if main.name == "__main__.py":
        return [sys.executable, "-m", "engram_jax"]
    return [sys.executable, str(main)]


def _report(plan: Plan) -> bool:
    """Write the report and say where it is; whether there is one."""
    path = write_report(plan)
    if path is not None:
        print(f"report: {path}")
        return True
    print(f"no run in {plan.folder} is finished: no report")
    first = (*plan.trials(), *plan.runs(plan.chosen_rates()))
    for reason in dict.fromkeys(map(plan.missing, first)):
        if reason != "not finished":
            print(reason)
    return False
