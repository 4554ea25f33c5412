"""Text as documents want it: HTML without its markup, long pages in parts, entries in groups."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser

_SKIPPED = {"script", "style", "head", "nav", "form", "select", "footer", "svg", "button"}
_LINE = {"div", "li", "dt", "dd", "tr", "br", "hr", "section", "tbody", "thead", "caption"}
_PARAGRAPH = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote"}
_VOID = {"br", "hr", "img", "input", "link", "meta", "wbr", "col"}

# (tag, its attributes) -> whether it matches.
Matches = Callable[[str, dict[str, str]], bool]


class _TextOf(HTMLParser):
    """Collects lines; an unclosed <p> or <li>, which HTML allows, is no obstacle: only elements of
    the name of the one that is skipped, or is the main one, are counted."""

    def __init__(self, dropped: Matches, main: Matches | None) -> None:
        super().__init__(convert_charrefs=True)
        self._dropped, self._main = dropped, main
        self._skipping: list[str] = []
        self._inside: list[str] | None = [] if main else None
        self._pre = 0
        self._line = ""
        self.lines: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if self._skipping:
            self._skipping += [tag] * (tag == self._skipping[0])
            return
        if self._inside is not None:
            if not self._inside:
                if self._main and self._main(tag, found):
                    self._inside.append(tag)
                return
            self._inside += [tag] * (tag == self._inside[0])
        if tag not in _VOID and (tag in _SKIPPED or self._dropped(tag, found)):
            self._skipping.append(tag)
        elif tag == "pre":
            self._break(paragraph=True)
            self._pre += 1
        elif tag in _PARAGRAPH or tag in _LINE:
            self._break(paragraph=tag in _PARAGRAPH)
            self._line += "- " * (tag == "li")
        elif tag in ("td", "th") and self._line.strip():
            self._line += " | "

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.pop()
            return
        if self._inside is not None and not self._inside:
            return
        if tag == "pre" and self._pre:
            self._pre -= 1
            self._break(paragraph=True)
        elif tag in _PARAGRAPH or tag in _LINE:
            self._break(paragraph=tag in _PARAGRAPH)
        if self._inside and tag == self._inside[0]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._skipping or (self._inside is not None and not self._inside):
            return
        if self._pre:
            *full, self._line = (self._line + data).split("\n")
            self.lines += full
        else:
            self._line += re.sub(r"\s+", " ", data)

    def _break(self, *, paragraph: bool) -> None:
        line = self._line if self._pre else re.sub(r" +", " ", self._line).strip()
        if line.strip() not in ("", "-"):
            self.lines.append(line)
            self._line = ""
        elif line.strip() == "":
            self._line = ""
        if paragraph and self.lines and self.lines[-1]:
            self.lines.append("")

    def close(self) -> None:
        super().close()
        self._break(paragraph=False)


def html_to_text(html: str, dropped: Matches, main: Matches | None = None) -> str:
    """A page's text: a line per paragraph, item or table row (cells between bars), blank lines
    between paragraphs, <pre> as it is.

    dropped: elements that are left out with all that is in them; scripts, navigation and forms
    always are. main: the element that holds the text; None = all of the page.
    """
    parser = _TextOf(dropped, main)
    parser.feed(html)
    parser.close()
    return clean("\n".join(parser.lines))


def clean(text: str) -> str:
    """Composed characters, plain spaces and hyphens, no control characters, no spaces at the ends
    of lines and at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    text = text.translate({0xA0: " ", 0x2010: "-", 0x2011: "-", 0xAD: None, 0x200B: None})
    text = re.sub(r"[^\S\n\t]", " ", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def parts(text: str, limit: int, between: str = "\n\n") -> Iterator[str]:
    """`text` in parts of about equal size, about `limit` bytes at most, cut at `between`
    (paragraphs by default), or at line ends where what is between is longer than that."""
    size = max(1, len(text.encode()))
    wanted = size / -(-size // limit)
    found: dict[int, str] = {}
    start = 0
    for piece in re.split(f"(?<={between})", text):
        long = len(piece.encode()) > limit
        for unit in piece.splitlines(keepends=True) if long else [piece]:
            length = len(unit.encode())
            number = int((start + length / 2) / wanted)  # where the middle of the unit falls
            found[number] = found.get(number, "") + unit
            start += length
    return iter(found.values())


def groups(entries: Iterable[str], limit: int) -> Iterator[str]:
    """Consecutive entries joined until they have about `limit` bytes."""
    held: list[str] = []
    size = 0
    for entry in entries:
        more = len(entry.encode())
        if held and size + more / 2 > limit:
            yield "".join(held)
            held, size = [], 0
        held.append(entry)
        size += more
    if held:
        yield "".join(held)
