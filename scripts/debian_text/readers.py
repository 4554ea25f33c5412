"""The packages' files as documents: (name, text) pairs, in an order that the files alone decide.

Each reader takes the folder into which one package was unpacked.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.debian_text.plain_text import clean, groups, html_to_text, parts

Documents = Iterator[tuple[str, str]]

PAGE = 8_000  # bytes: pages above it are cut into parts
GROUP = 4_000  # bytes: entries of a dictionary, fortunes and records are joined up to it

_NAVIGATION = {"navheader", "navfooter", "toc", "nosearch", "headerlink", "related", "clearer"}
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SOURCE = re.compile(
    r"\[[^\[\]\n]*(1913 Webster|Webster 1913|WordNet [\d.]+|PJC|Century Dict)[^\[\]\n]*\]"
)
_SENSE = re.compile(r"(\d+[:.]|\([a-z0-9]+\)|[A-Z][a-z]+\.? ?[A-Za-z]*:|n |v |adj |adv |-- ?\S)")


def numbered(stem: str, texts: Iterable[str]) -> Documents:
    """`stem`.txt for one text, `stem`-0001.txt and so on for several; colons become hyphens."""
    found, stem = list(texts), re.sub(r":+", "-", stem)
    for number, text in enumerate(found, 1):
        yield f"{stem}-{number:04}.txt" if len(found) > 1 else f"{stem}.txt", clean(text)


def dictionary(folder: Path) -> Documents:
    """dictd's files: the index names each entry's bytes in the text; entries in the text's order.
    Wrapped lines are joined, and the marks of links and of sources are left out."""
    (index,) = folder.glob("usr/share/dictd/*.index")
    text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    places = set()
    for line in index.read_text().splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith(("00-database", "00database")):
            places.add((_number(start), _number(size)))
    entries = (_entry(_decoded(text[start : start + size])) for start, size in sorted(places))
    yield from numbered(index.stem, groups((e for e in entries if e), GROUP))


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:  # a few entries of dict-gcide are older than their file's encoding
        return text.decode("cp1252", errors="replace")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


def _entry(text: str) -> str:
    text = _SOURCE.sub("", text)
    head, *lines = text.replace("{", "").replace("}", "").splitlines()
    out = [head.rstrip()]
    joining = True
    for line in lines:
        text = line.strip()
        if joining and line.startswith(" ") and text and not _SENSE.match(text):
            out[-1] += " " + text
        elif text:
            out.append(text)
        joining = bool(text)
    return "\n".join(out) + "\n\n"


def man_pages(folder: Path) -> Documents:
    """man's text with a line per paragraph, without the lines at the head and foot of a page."""
    files = sorted(folder.glob("usr/share/man/man*/*.gz"))
    files = [f for f in files if not f.is_symlink()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, text in zip(files, pool.map(_man_page, files), strict=True):
            if text:
                yield from numbered(path.name.removesuffix(".gz"), parts(text, PAGE))


def _man_page(path: Path) -> str:
    if gzip.decompress(path.read_bytes()).lstrip().startswith(b".so "):
        return ""  # a page that is another page
    env = {**os.environ, "MANWIDTH": "5000", "LC_ALL": "C.UTF-8"}
    env.pop("MAN_KEEP_FORMATTING", None)
    command = ["man", "--nh", "--nj", "--local-file", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, check=True)
    lines = done.stdout.decode(errors="replace").strip("\n").split("\n")[1:-1]
    return clean("\n".join(map(_unframed, lines)))


def _unframed(line: str) -> str:
    """A line of a man page without the page's indentation and the frames of tables."""
    line = re.sub(r"[─━═┌┐└┘├┤┬┴┼╞╪╡╪]+", "", line)
    line = re.sub(r"\s*[│┃]\s*", " | ", line).removeprefix(" | ").removesuffix(" | ")
    line = re.sub(r"(?<=\S) {3,}", "  ", line)
    return line[min(7, len(line) - len(line.lstrip(" "))) :]


def html_pages(folder: Path, skip: str = "^$") -> Documents:
    """Every HTML page without its navigation; skip: names that are indexes or the like."""
    root = folder / "usr/share"
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or re.search(skip, name):
            continue
        html = path.read_text(encoding="utf-8", errors="replace")
        main = _is_main if 'role="main"' in html else None
        text = html_to_text(html, _is_navigation, main)
        text = re.sub(r"\n(This page last modified on|See also lists of) .*\n", "\n", text)
        stem = re.sub(r"^(doc/)?[^/]+/(html/)?", "", name).removesuffix(".html").replace("/", "-")
        yield from numbered(stem, parts(text, PAGE))


def _is_navigation(tag: str, attributes: dict[str, str]) -> bool:
    return bool(_NAVIGATION & set(attributes.get("class", "").split()))


def _is_main(tag: str, attributes: dict[str, str]) -> bool:
    return attributes.get("role") == "main"


def asciidoc(folder: Path) -> Documents:
    """Git's pages as they are written, without the lines that only the formatter reads."""
    root = folder / "usr/share/doc/git-doc"
    for path in sorted(root.rglob("*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        markup = re.compile(
            r"(include|ifdef|ifndef|endif)::|\[\[.*\]\]$|\[verse\]$|[-=~^.+_]{4,}$|\+$"
        )
        text = clean("\n".join(line for line in lines if not markup.match(line)))
        stem = path.relative_to(root).with_suffix("").as_posix().replace("/", "-")
        yield from numbered(stem, parts(text, PAGE))


def fortunes(folder: Path) -> Documents:
    """The English collections; those of drawings are left out."""
    for path in sorted((folder / "usr/share/games/fortunes").iterdir()):
        if path.suffix or path.name in ("ascii-art", "translate-me"):
            continue
        found = re.split(r"^%\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        texts = (text.expandtabs() + "\n" for text in found if text.strip())
        yield from numbered(path.name, groups(texts, GROUP))


def bible(folder: Path, program: Path) -> Documents:
    """One document per chapter. The text is compressed; only the package's program reads it."""
    command = [str(program), "-f", "-p", str(folder / "usr/lib"), "Genesis1:1-Revelation22:21"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    chapters: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        place, _, verse = line.partition(" ")
        chapter, _, number = place.partition(":")
        chapters.setdefault(chapter, []).append(f"{number} {verse}")
    for chapter, verses in chapters.items():
        title = re.sub(r"(?<=\D)(\d+)$", r" \1", chapter)
        yield f"{chapter}.txt", clean("\n".join([title, *verses]))


def iso_codes(folder: Path) -> Documents:
    """A line per record: "France: alpha-2 FR, alpha-3 FRA, numeric 250, ..."."""
    root = folder / "usr/share/iso-codes/json"
    countries = {r["alpha_2"]: r["name"] for r in _records(root / "iso_3166-1.json")}
    for path in sorted(root.glob("iso_*.json")):
        lines = []
        for record in _records(path):
            name = record.pop("name")
            record.pop("flag", None)
            if "code" in record:  # a subdivision
                record["country"] = countries[record["code"].partition("-")[0]]
            facts = (
                f"{k.replace('alpha_', 'alpha-').replace('_', ' ')} {v}" for k, v in record.items()
            )
            lines.append(f"{name}: {', '.join(facts)}\n")
        yield from numbered(path.stem, groups(lines, GROUP))


def _records(path: Path) -> list[dict[str, str]]:
    (records,) = json.loads(path.read_text(encoding="utf-8")).values()
    return records


# The files of records: what their fields are called, the subject's first (its place in the line).
_FIELDS = {
    "airport": (1, ["code", "", "country", "region", "serves"]),
    "birthtoken": (0, ["", "birth stone", "birth flower"]),
    "countries": (3, ["UN code", "alpha-2", "alpha-3", "", "capital"]),
    "currency": (2, ["abbreviation", "code", ""]),
    "inter.phone": (1, ["country code", ""]),
    "na.phone": (1, ["area code", "", "state or province", "abbreviation"]),
    "na.postalcodes": (1, ["postal code", ""]),
}


_NOT_OF_A_CITY = ("Name", "ID", "Date", "Entered-By", "Location")


def miscfiles(folder: Path) -> Documents:
    """Facts, a line per record, and two documents in full; word lists and character tables are left
    out."""
    for name, (subject, fields) in _FIELDS.items():
        lines = []
        for line in _unzipped(folder / f"usr/share/misc/{name}.gz").splitlines():
            values = [value.strip().replace("|", "; ") for value in line.split(":")]
            if line.startswith("#") or len(values) != len(fields):
                continue
            facts = [f"{f} {v}" for f, v in zip(fields, values, strict=True) if f and v]
            lines.append(f"{values[subject]}: {', '.join(facts)}\n")
        yield from numbered(name, groups(lines, GROUP))
    cities = []
    for record in _unzipped(folder / "usr/share/misc/cities.dat.gz").split("\n//\n"):
        split = (line.partition(":") for line in record.splitlines())
        known = {key.strip(): value.strip() for key, _, value in split}
        name = known.get("Name")
        kept = [f"{k.lower()} {v}" for k, v in known.items() if v and k not in _NOT_OF_A_CITY]
        if name:
            cities.append(f"{name}: {', '.join(kept)}\n")
    yield from numbered("cities", groups(cities, GROUP))
    for name in ("us-constitution", "us-declaration"):
        text = clean(_unzipped(folder / f"usr/share/state/{name}.gz"))
        yield from numbered(name, parts(text, PAGE))


def _unzipped(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")
