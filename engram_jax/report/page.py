"""A report's sections as one self-contained HTML file, and as Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of the report: a picture or a table with its caption, or texts.

    header: of the table's columns, () = none. texts: (prompt, continuation) pairs. tokens: a text
    with a number from 0 to 1 and a note for each token, shown as the colour behind it, in HTML
    alone. folded: the table or the tokens are shown when the reader asks for them.
    """

    title: str
    caption: str = ""
    picture: Path | None = None
    header: tuple[str, ...] = ()
    rows: Rows = ()
    texts: Sequence[tuple[str, str]] = ()
    tokens: Sequence[tuple[str, float, str]] = ()
    folded: bool = False


def as_markdown(title: str, subtitle: str, sections: Sequence[Section], root: Path) -> str:
    """root: the folder of the file, which the pictures are below."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    def line(row: Sequence[str]) -> str:
        return f"| {' | '.join(map(cell, row))} |"

    parts = [f"# {title}", *([subtitle] if subtitle else [])]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.rows:
            columns = len(section.rows[0])
            rows = [section.header or ("",) * columns, ("---",) * columns, *section.rows]
            table = "\n".join(map(line, rows))
            if section.folded:
                summary = f"<summary>{len(section.rows)} rows</summary>"
                table = f"<details>\n{summary}\n\n{table}\n\n</details>"
            parts.append(table)
        if section.picture is not None:
            parts.append(f"![{section.title}]({section.picture.relative_to(root).as_posix()})")
        if section.caption:
            parts.append(section.caption)
        for prompt, text in section.texts:
            indented = "\n".join("    " + line for line in (prompt + text).splitlines())
            parts.append(f"Prompt `{cell(prompt)}`:\n\n{indented}")
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.5rem; color: #22272e;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h1 + p { color: #6b7480; margin-top: 0 }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
img { max-width: 100%; height: auto } figure { margin: 0 }
.note { color: #6b7480; font-size: .88rem; margin: .4rem 0 0 }
table { border-collapse: collapse }
th { text-align: left; font-weight: 600; font-size: .88rem; color: #6b7480;
     padding: 0 2rem .3rem 0 }
td { padding: .3rem 2rem .3rem 0; border-top: 1px solid #e4e8ec; vertical-align: top;
     overflow-wrap: anywhere }
td:first-child { color: #6b7480; white-space: nowrap }
td + td { font-variant-numeric: tabular-nums }
summary { cursor: pointer; color: #2166ac } details table { font-size: .88rem; margin-top: .6rem }
pre { background: #f6f8fa; border-radius: 6px; padding: .9rem 1.1rem; font-size: .86rem;
      white-space: pre-wrap; overflow-wrap: anywhere } pre b { color: #2166ac }
pre.tokens { line-height: 1.7; background: none; border: 1px solid #e4e8ec }
pre.tokens span { border-radius: 2px; padding: .12em 0 }
"""


def as_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Pictures are inside the file; it refers to nothing else."""
    text = html.escape
    parts = [f"<h1>{text(title)}</h1>", *([f"<p>{text(subtitle)}</p>"] if subtitle else [])]
    for section in sections:
        parts.append(f"<h2>{text(section.title)}</h2>")
        note = f'<p class="note">{text(section.caption)}</p>' if section.caption else ""
        if section.rows:
            head = "".join(f"<th>{text(name)}</th>" for name in section.header)
            rows = [
                f"<tr>{''.join(f'<td>{text(c)}</td>' for c in row)}</tr>" for row in section.rows
            ]
            table = f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(rows)}</table>"
            if section.folded:
                table = f"<details><summary>{len(rows)} rows</summary>{table}</details>"
            parts.append(table + note)
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            image = f'<img alt="{text(section.title)}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}{note}</figure>")
        if section.tokens:
            spans = "".join(_span(*token) for token in section.tokens)
            block = f'<pre class="tokens">{spans}</pre>'
            if section.folded:
                block = f"<details><summary>show</summary>{block}</details>"
            parts.append(block + note)
        if not section.rows and section.picture is None and not section.tokens:
            parts.append(note)
        for prompt, continuation in section.texts:
            parts.append(f"<pre><b>{text(prompt)}</b>{text(continuation)}</pre>")
    head = f"<meta charset='utf-8'><title>{text(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{body}</body></html>\n"


# White to red, as the pictures' heat maps (figures.py).
_HEAT = ((255, 255, 255), (253, 212, 158), (252, 141, 89), (215, 48, 31))


def heat(strength: float) -> str:
    """The colour of a number from 0 to 1, "#rrggbb"; 0 is white."""
    at = min(max(strength, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(at), len(_HEAT) - 2)
    mixed = (a + (at - low) * (b - a) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _span(token: str, strength: float, note: str) -> str:
    dark = ";color:#fff" if strength > 0.85 else ""
    # A token that is nothing but an end of line has a mark: it could not be seen.
    shown = token if token.strip("\r\n") else token.replace("\r", "").replace("\n", "↵\n") or "∅"
    style = f"background:{heat(strength)}{dark}"
    return f'<span style="{style}" title="{html.escape(note)}">{html.escape(shown)}</span>'
