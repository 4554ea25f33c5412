"""The report of an experiment: report.html, report.md and the pictures beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engram_jax.evaluation.target_losses import ORDERS
from engram_jax.hardware.storage import replacing
from engram_jax.lab.comparison import Compared, compare, text
from engram_jax.lab.experiment import Launch, text_of
from engram_jax.lab.plan import Plan
from engram_jax.lab.results import Row, collect, write_table
from engram_jax.lab.statistics import RESAMPLES, Interval, fit_line
from engram_jax.report.page import Section, as_html, as_markdown

if TYPE_CHECKING:
    from engram_jax.lab.figures import Series

_INTERVALS = (
    "Differences are to {baseline}, seed by seed, for initial values and batches are common to the"
    " runs of a seed: the mean, its 95 % interval over seeds (Student's t; none of one seed), and"
    f" the 95 % interval of a paired bootstrap over held-out documents ({RESAMPLES:,} resamples)."
    " The learning rate of a family was chosen by the same held-out loss, at one seed."
)
_OUTCOMES = ("diverged", "failed", "not finished")
_SIDES = ("seen", "unseen")
_CONTEXT = (
    "Of the targets whose last 2, 3 or 4 tokens of context stood in the training text, in order,"
    " and of the others; means over seeds."
)
_BUDGET = (
    "P_tot, P_act: all parameters, and those a token is multiplied with, both without vocabulary"
    " embedding and head; rho: the routed experts' share of their difference. Lookups per row: how"
    " often a row was looked up in training, on average. In % against the base."
)


def write_report(plan: Plan) -> Path | None:
    """Write results.csv, results.parquet, report.html and report.md into the sweep's folder.

    Returns the path of report.html; None, and writes nothing, if no run is finished.
    """
    rows = collect(plan)
    if not rows:
        return None
    write_table(plan.folder, rows)
    compared = compare(plan, rows)
    title, subtitle = plan.experiment.title, _subtitle(rows)
    sections = [
        *_pictures(plan, compared),
        _losses(plan, compared),
        *_by_context(compared),
        _budgets(compared),
        _trials(plan, rows),
        *_notes(plan, rows),
        _commands(rows),
    ]
    for name, page in (
        ("report.md", as_markdown(title, subtitle, sections, plan.folder)),
        ("report.html", as_html(title, subtitle, sections)),
    ):
        with replacing(plan.folder / name) as file:
            file.write(page.encode())
    return plan.folder / "report.html"


def _subtitle(rows: Sequence[Row]) -> str:
    hours, processor = (sum(row[key] for row in rows) / 3600 for key in ("seconds", "cpu_seconds"))
    machines = sorted({row["machine"] for row in rows})
    tokens = sorted({f"{row['tokens']:,}" for row in rows})
    days = sorted({row["started"][:10] for row in rows})
    commits = sorted({_short(row["commit"]) for row in rows})
    return (
        f"{len(rows)} runs of {' or '.join(tokens)} tokens, {hours:.2f} hours"
        f" ({processor:.2f} of processor time) on {', '.join(machines)};"
        f" {days[0]} to {days[-1]}; commit {', '.join(commits)}"
    )


def _losses(plan: Plan, compared: Sequence[Compared]) -> Section:
    header = (
        *("point", "seeds", "learning rate", "held-out loss"),
        *("difference", "of seeds", "95 % over seeds", "95 % over documents", "hours"),
    )
    rows = tuple(
        (
            _title(one),
            ", ".join(str(row["seed"]) for row in one.rows),
            text_of(one.rows[0]["learning_rate"]),
            f"{one.loss:.4f}",
            _signed(one.difference.mean),
            ", ".join(map(str, one.seeds)) or "-",
            _interval(one.difference),
            _interval(one.by_documents),
            f"{sum(row['seconds'] for row in one.rows) / 3600:.2f}",
        )
        for one in compared
    )
    caption = _INTERVALS.format(baseline=plan.experiment.baseline)
    return Section("Held-out loss", caption, header=header, rows=rows)


def _by_context(compared: Sequence[Compared]) -> list[Section]:
    """The losses of targets whose n-gram of context was seen in training, and of the others."""
    rows = []
    for one in compared:
        pairs = [[_mean(one.rows, f"{side}_loss_{n}") for side in _SIDES] for n in ORDERS]
        rows.append((_title(one), *(" / ".join(pair) for pair in pairs)))
    if all(cell == "- / -" for row in rows for cell in row[1:]):
        return []
    header = ("point", *(f"{n} tokens: seen / unseen" for n in ORDERS))
    return [Section("Held-out loss by context", _CONTEXT, header=header, rows=tuple(rows))]


def _budgets(compared: Sequence[Compared]) -> Section:
    header = (
        *("point", "P_tot", "P_act", "rho", "FLOPs per token", "rows", "lookups per row"),
        *("P_tot", "P_act", "FLOPs"),
    )
    rows = tuple(
        (
            one.point.name,
            f"{row['P_tot']:,}",
            f"{row['P_act']:,}",
            "-" if row["rho"] is None else f"{row['rho']:.3f}",
            f"{row['flops_per_token']:,.0f}",
            f"{row['rows']:,}",
            "-" if row["lookups_per_row"] is None else f"{row['lookups_per_row']:,.1f}",
            *(f"{row[f'mismatch_{name}']:+.3%}" for name in ("total", "active", "flops")),
        )
        for one in compared
        for row in one.rows[:1]
    )
    return Section("Budgets", _BUDGET, header=header, rows=rows)


def _trials(plan: Plan, rows: Sequence[Row]) -> Section:
    """The learning rates that were tried, the chosen ones marked."""
    chosen, found = (
        plan.chosen_rates(),
        {(r["point"], r["seed"], r["learning_rate"]): r for r in rows},
    )
    shown = []
    for launch in plan.trials():
        row = found.get((launch.point.name, launch.seed, launch.rate))
        family = launch.point.family
        shown.append(
            (
                family,
                launch.point.name,
                str(launch.seed),
                text_of(launch.rate),
                _outcome(plan, launch) if row is None else f"{row['held_out_loss']:.4f}",
                _chosen(plan, launch) if chosen.get(family) == launch.rate else "",
            )
        )
    header = ("family", "tried at", "seed", "learning rate", "held-out loss", "")
    return Section("Learning rates", header=header, rows=tuple(shown))


def _outcome(plan: Plan, launch: Launch) -> str:
    """Of a trial without a loss: "diverged", "failed", "not finished" or "other settings"."""
    why = plan.missing(launch).partition(":")[0]
    return why if why in _OUTCOMES else "other settings"


def _chosen(plan: Plan, launch: Launch) -> str:
    """What stands beside the rate that was chosen; a better one may lie beyond an edge."""
    rates = plan.experiment.rates[launch.point.family]
    return "used; edge of the rates tried" if launch.rate in (min(rates), max(rates)) else "used"


def _notes(plan: Plan, rows: Sequence[Row]) -> list[Section]:
    """What is missing or does not fit together."""
    done = {(row["point"], row["seed"], row["learning_rate"]) for row in rows}
    wanted = dict.fromkeys((*plan.trials(), *plan.runs(plan.chosen_rates())))
    notes: list[tuple[str, str]] = []
    for launch in wanted:
        if (launch.point.name, launch.seed, launch.rate) in done:
            continue
        notes.append((launch.name, plan.missing(launch)))
    baseline = [row for row in rows if row["point"] == plan.experiment.baseline]
    first = text((baseline or rows)[0])
    for row in rows:
        if text(row) != first:
            digest, targets = text(row)
            why = f"read another text ({digest}, {targets:,} held-out targets) than {first[0]}"
            notes.append((run_name(row), f"{why}, {first[1]:,}: not compared with runs of that"))
    return [Section("Missing", rows=tuple(notes))] if notes else []


def run_name(row: Row) -> str:
    """Of a run, as its folder is called."""
    return f"{row['point']},seed={row['seed']},rate={text_of(row['learning_rate'])}"


def _commands(rows: Sequence[Row]) -> Section:
    header = ("started", "seconds", "machine", "commit", "loss", "command")
    shown = tuple(
        (
            row["started"],
            f"{row['seconds']:.0f}",
            row["machine"],
            _short(row["commit"]),
            f"{row['held_out_loss']:.6f}",
            row["command"],
        )
        for row in rows
    )
    return Section("Commands", "One for each run.", header=header, rows=shown, folded=True)


def _pictures(plan: Plan, compared: Sequence[Compared]) -> list[Section]:
    """What can be drawn: the loss over the axis, or the differences of named points."""
    from engram_jax.lab import figures

    experiment = plan.experiment
    path = plan.folder / experiment.name
    if not experiment.column:
        others = [one for one in compared if not math.isnan(one.difference.mean)]
        if not others:
            return []
        names, intervals = [_title(one) for one in others], [one.difference for one in others]
        figure = figures.differences(names, intervals, experiment.baseline)
    else:
        on_axis = [one for one in compared if _has_place(plan, one)]
        if not on_axis:
            return []
        off = [one for one in compared if one not in on_axis]
        off = [one for one in off if one.point.name == experiment.baseline]
        baseline = (_title(off[0]), off[0].loss) if off else None
        series = [
            _series(plan, name, [one for one in on_axis if one.point.variant == name])
            for name in dict.fromkeys(one.point.variant for one in on_axis)
        ]
        label, log = experiment.axis, experiment.log_axis
        figure = figures.over_axis(series, label, log=log, baseline=baseline)
    figures.save(figure, path)
    caption = (
        f"Bars: 95 % intervals over seeds of the difference to {experiment.baseline}, paired."
        f" {experiment.name}.svg is the same picture."
    )
    return [Section(experiment.axis, caption, path.with_suffix(".png"))]


def _has_place(plan: Plan, one: Compared) -> bool:
    """Whether a point has a value on the axis; 0 has none on a logarithmic one."""
    value = one.rows[0][plan.experiment.column]
    return value is not None and not (plan.experiment.log_axis and value <= 0)


def _series(plan: Plan, name: str, points: Sequence[Compared]) -> Series:
    from engram_jax.lab.figures import Series

    x = [float(one.rows[0][plan.experiment.column]) for one in points]
    y = [one.loss for one in points]
    fits = plan.experiment.log_axis and len(set(x)) > 2
    fitted = fit_line([math.log10(value) for value in x], y) if fits else None
    return Series(name, x, y, [one.difference for one in points], fitted)


def _short(commit: str) -> str:
    """12 digits of the hash, and whether there were changes."""
    digits, space, changes = commit.partition(" ")
    return digits[:12] + space + changes


def _title(one: Compared) -> str:
    variant = one.point.variant
    return one.point.name if variant in one.point.name else f"{variant}, {one.point.name}"


def _mean(rows: Sequence[Row], name: str) -> str:
    found = [row[name] for row in rows if row[name] is not None]
    return f"{sum(found) / len(found):.4f}" if len(found) == len(rows) else "-"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"


def _interval(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.low):
        return "-"
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]"
