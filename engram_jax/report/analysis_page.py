"""An analysis (--mode=analyse) as one self-contained page, from its record of JSON values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config.extras import lacks
from engram_jax.hardware.storage import replacing, write_text
from engram_jax.report.page import Section, as_html

Record = Mapping[str, Any]
Draw = Callable[[str, str, str, Callable[[Any], Any]], list[Section]]


def write_page(page: Path, record: Record) -> None:
    """Write the page, and its pictures as PNG into the folder beside it that is called like it.

    Without the extra `report` there are no pictures, and the page says why.
    """
    folder, missing = page.with_suffix(""), lacks("report")

    def draw(name: str, title: str, caption: str, make: Callable[[Any], Any]) -> list[Section]:
        """make: the module of figures -> the figure."""
        if missing:
            return []
        from engram_jax.report import analysis_figures

        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{name}.png", shared=False) as file:
            make(analysis_figures).savefig(file, format="png")
        return [Section(title, caption, folder / f"{name}.png")]

    sections = [Section("Pictures", f"None are drawn: {missing}.")] if missing else []
    for name, make in _SECTIONS.items():
        if name in record:
            sections += make(record[name], draw)
    if record["left_out"]:
        sections.append(Section("Left out", rows=tuple(record["left_out"].items())))
    sections.append(_how(record))
    subtitle = f"run {record['run']}, step {record['step']:,}, checkpoint {record['checkpoint']}"
    if against := record.get("against"):
        subtitle += f"; against {against['run']}, step {against['step']:,} ({against['name']})"
        if not against["same_text"]:
            subtitle += ", which was trained on another text"
    write_text(page, as_html(f"{record['name']}: an analysis", subtitle, sections))


def _lens(found: Record, draw: Draw) -> list[Section]:
    caption = (
        "LogitLens: every layer's state through the last norm and the head, and the divergence"
        " KL(layer || last layer) of what it predicts; low early means that the prediction is made"
        " early. Shade: two standard errors, sequences being what is drawn. Diamonds: layers with"
        f" an Engram in front. Over {found['tokens']:,} tokens of {found['of']}."
    )
    models = found["models"]
    header = ("layer", *(f"{m['name']} ({m['run']})" for m in models))
    rows = tuple(
        (
            str(layer),
            *(
                f"{_number(m['kl'][layer])} ± {_number(m['standard_error'][layer])}"
                if layer < len(m["kl"])
                else ""
                for m in models
            ),
        )
        for layer in range(max(len(m["kl"]) for m in models))
    )
    picture = draw("lens", "LogitLens", caption, lambda f: f.lens_figure(found))
    note = "Nats per token, and the standard error." if picture else caption
    return [*picture, Section("KL by layer", note, header=header, rows=rows, folded=True)]


def _cka(found: Record, draw: Draw) -> list[Section]:
    caption = (
        f"CKA (linear kernel, unbiased HSIC, {found['minibatches']} minibatches) of the states at"
        f" the {found['entity_tokens']:,} tokens in which entities end ({found['entities']}) in"
        f" {found['tokens']:,} tokens of {found['of']}. Layers count from 0."
    )
    sections = draw("cka", "Similar layers", caption, lambda f: f.cka_figure(found))
    if not sections:
        header = ("layer of the first", *map(str, range(len(found["cka"][0]))))
        rows = tuple((str(i), *map(_number, row)) for i, row in enumerate(found["cka"]))
        sections = [Section("Similar layers", caption, header=header, rows=rows)]
    if found["soft_alignment"] is not None:
        rows = tuple((str(i), _number(a)) for i, a in enumerate(found["soft_alignment"]))
        note = "The mean of the five most similar layers, weighted by similarity: the red line."
        header = (f"layer of {found['second']}", f"is like layer of {found['first']}")
        sections.append(Section("Soft alignment", note, header=header, rows=rows))
    return sections


def _sensitivity(found: Record, draw: Draw) -> list[Section]:
    counted = _counted(found["counted"])
    caption = (
        "Nothing is trained again: a part's rows are read as zero, or a layer adds nothing. Bands:"
        f" only where the n-gram that ends at a token was so often in {counted}. Loss with all on:"
        f" {found['loss']:.4f}, over {found['targets']:,} targets of {found['of']}. Where changed:"
        " over the targets right after a token whose rows are off. ±: a standard error, sequences"
        " being what is drawn."
    )
    header = ("off", "loss rises by", "targets changed", "there it rises by")
    rows = tuple(
        (
            part["part"],
            f"{_signed(part['rise'])} ± {_number(part['standard_error'])}",
            f"{part['affected']:,}",
            _signed(part["rise_where_affected"]),
        )
        for part in found["parts"]
    )
    title = "What the loss owes to the memory"
    picture = draw("sensitivity", title, "", lambda f: f.sensitivity_figure(found["parts"]))
    sections = [*picture, Section("Parts off", caption, header=header, rows=rows)]
    if tasks := found.get("tasks"):
        sections.append(_tasks(tasks))
    return sections


def _tasks(tasks: Sequence[Record]) -> Section:
    """Accuracies by likelihood, a row for each part and a column for each group of items."""
    groups = tasks[0]["groups"]
    header = ("off", *(_group(group) for group in groups))
    rows: list[tuple[str, ...]] = [("nothing", *(_percent(group["on"]) for group in groups))]
    rows += [(part["part"], *(_percent(g["off"]) for g in part["groups"])) for part in tasks]
    caption = (
        "Accuracy by likelihood with its standard error, of the first items of each group;"
        f" chance is {groups[0]['chance']:.0%}."
    )
    return Section("Synthetic tasks", caption, header=header, rows=tuple(rows))


def _group(group: Record) -> str:
    times = f", stated {group['frequency']} times" if group["frequency"] else ""
    return f"{group['task']} {group['difficulty']}{times} ({group['items']})"


def _gates(found: Record, draw: Draw) -> list[Section]:
    gates = np.asarray(found["gates"], np.float64)  # [L, T, M]
    if not gates.size:
        return [Section("Gates", "No layer has any.")]
    low, high = float(np.nanmin(gates)), float(np.nanmax(gates))
    of = f"the first {found['shown']:,} of {found['whole']:,} tokens of {found['of']}"
    scale = f"white {low:.2f}, red {high:.2f}; over a token: its gates"

    def coloured(values: np.ndarray, each: np.ndarray) -> tuple[tuple[str, float, str], ...]:
        strengths = (values - low) / max(high - low, 1e-9)
        notes = (", ".join(f"{x:.2f}" for x in row) for row in each)
        return tuple(zip(found["tokens"], strengths.tolist(), notes, strict=True))

    sections, branches = [], gates.shape[2]
    for layer, each in zip(found["layers"], gates, strict=True):
        title = f"Gates at layer {layer}" + (", mean over branches" if branches > 1 else "")
        caption = f"{of[0].upper()}{of[1:]}; {scale}."
        sections.append(Section(title, caption, tokens=coloured(each.mean(axis=1), each)))
        if branches > 1:
            own = [
                token
                for b in range(branches)
                for token in ((f"\n\nbranch {b}\n", 0.0, ""), *coloured(each[:, b], each))
            ]
            title = f"Gates at layer {layer}, by branch"
            sections.append(Section(title, tokens=own, folded=True))
    names = [f"{layer}, branch {b}" for layer in found["layers"] for b in range(branches)]
    rows = gates.transpose(0, 2, 1).reshape(len(names), -1)
    picture = partial(_gate_picture, tokens=found["tokens"], gates=rows, names=names)
    return [*sections, *draw("gates", "Gates, as a picture", of, picture)]


def _gate_picture(_: Any, tokens: Sequence[str], gates: np.ndarray, names: list[str]) -> Any:
    from engram_jax.report.figures import gate_figure

    return gate_figure(tokens, gates, names)


def _usage(found: Record, draw: Draw) -> list[Section]:
    counted, bands = _counted(found["counted"]), found["bands"]
    sections = []
    for layer, orders in found["layers"].items():
        caption = (
            f"Which rows {counted} reads, each token once in every head. Right: a row that is never"
            " read is as it was drawn."
        )
        make = partial(_usage_picture, orders=orders, bands=bands)
        sections += draw(f"usage_{layer}", f"Rows of layer {layer}", caption, make)
        header = (
            *("order, head", "rows", "never read", "mean hits", "n-grams that share a row"),
            *("expected of random rows",),
        )
        rows = tuple(
            (
                f"{order}, {j}",
                f"{head['rows']:,}",
                f"{head['dead']:.1%}",
                f"{used['positions'] / head['rows']:,.1f}",
                f"{head['sharing']:,} of {used['ngrams']:,}",
                f"{head['expected_sharing']:,.0f}",
            )
            for order, used in orders.items()
            for j, head in enumerate(used["heads"])
        )
        note = "; ".join(
            f"{order}-grams: {used['ngrams']:,} different ones at {used['positions']:,} tokens,"
            f" Zipf's exponent {_number(used['zipf'])}, {used['inseparable']:,} share the rows of"
            " all heads with another"
            for order, used in orders.items()
        )
        sections.append(Section(f"Collisions at layer {layer}", note, header=header, rows=rows))
    columns = ("n-gram in training", "targets", "loss", "loss, memory off", "memory saves")
    losses = found["loss_by_frequency"]
    of_bands = tuple(
        (
            f"{loss['order']}-gram {loss['band']}",
            f"{loss['targets']:,}",
            _number(loss["loss"]),
            _number(loss["loss_off"]),
            _signed(None if loss["loss"] is None else loss["loss_off"] - loss["loss"]),
        )
        for loss in losses
    )
    caption = (
        f"Targets of {found['loss_of']}, by how often the n-gram before them, in canonical ids, was"
        f" in {counted}. Off: all Engram layers add nothing."
    )
    title = "Hot and cold n-grams"
    sections += draw("frequency", title, "", lambda f: f.frequency_figure(losses))
    sections.append(Section("Loss by frequency", caption, header=columns, rows=of_bands))
    return sections


def _usage_picture(figures: Any, orders: Record, bands: Sequence[str]) -> Any:
    return figures.usage_figure(orders, bands)


def _rows(found: Record, draw: Draw) -> list[Section]:
    caption = (
        f"n-grams of {_counted(found['counted'])} that read a row, with how often each does, and"
        " the rows of the same head with the highest cosine, each with its most frequent reader."
        " n-grams are of canonical ids, which know no case, with a dot between each two; ␣ is a"
        " space, ⊢ stands before a document's start."
    )
    header = ("row", "", "read by", "nearest rows")
    return [
        Section(
            f"What rows of layer {layer} answer to",
            caption,
            header=header,
            rows=tuple(_row(row) for row in rows),
        )
        for layer, rows in found["layers"].items()
    ]


def _row(row: Record) -> tuple[str, ...]:
    more = row["different"] - len(row["readers"])
    read = [f"{_quoted(x['ngram'])} {x['count']:,}" for x in row["readers"]]
    near = [
        f"{x['cosine']:.2f} {' '.join(_quoted(r['ngram']) for r in x['readers']) or '(never read)'}"
        for x in row["nearest"][:5]
    ]
    return (
        f"{row['row']:,}",
        f"{row['why']}; head {row['head']}, norm {row['norm']:.2f}, {row['hits']:,} hits",
        ", ".join(read) + (f" and {more:,} more" if more > 0 else ""),
        ", ".join(near),
    )


def _how(record: Record) -> Section:
    """Times and sizes."""
    batches = record["batches"]
    rows = [("sequences at a time", f"{batches['sequences']} of {batches['tokens']} tokens")]
    if batches["tokens"] != record["trained_tokens"]:
        rows.append(("sequences in training", f"{record['trained_tokens']} tokens"))
    for name, took in record["seconds"].items():
        rows.append((name, f"{took['wall']:.1f} s, {took['processor']:.1f} s of processor time"))
    return Section("How it was made", rows=tuple(rows))


_SECTIONS: dict[str, Callable[[Record, Draw], list[Section]]] = {
    "lens": _lens,
    "cka": _cka,
    "sensitivity": _sensitivity,
    "gates": _gates,
    "usage": _usage,
    "rows": _rows,
}


def _counted(counted: Record) -> str:
    part = "" if counted["all"] else f"the first {counted['steps']:,} batches, "
    return f"the text it was trained on ({part}{counted['tokens']:,} tokens, each once)"


def _quoted(text: str) -> str:
    shown = text.replace("\n", "↵").replace("\t", "→").replace("\r", "")
    return f"“{shown}”"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.4f}"


def _percent(found: Record) -> str:
    return f"{found['accuracy']:.1%} ±{found['standard_error']:.1%}"
