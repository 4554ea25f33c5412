"""Text out of Debian's packages: readers on files made by hand; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from scripts.debian_text import readers
from scripts.debian_text.__main__ import digest, equal_shares, select, write_manifest
from scripts.debian_text.plain_text import clean, groups, html_to_text, parts

PAGE = """<html><head><title>no</title><style>p {}</style></head><body>
<div class="navheader"><table><tr><td>Prev</td><td>Next</td></tr></table><div>deep</div></div>
<h1>A <em>title</em></h1><p>First &amp; second,
on two lines.<p>An unclosed one.<ul><li>one<li>two <a class="headerlink">x</a></ul>
<pre>def f():
    return 1
</pre><table><tr><th>k</th><th>v</th></tr><tr><td>a</td><td>b</td></tr></table>
<script>var x;</script></body></html>"""


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def dropped(tag, attributes):
    return attributes.get("class") in ("navheader", "headerlink")


def test_html():
    assert html_to_text(PAGE, dropped) == (
        "A title\n\nFirst & second, on two lines.\n\nAn unclosed one.\n\n- one\n- two\n\n"
        "def f():\n    return 1\n\nk | v\na | b\n"
    )


def test_the_main_element_alone():
    html = '<div>out</div><div role="main"><div>in</div> this</div><div>out</div>'
    main = lambda tag, attributes: attributes.get("role") == "main"  # noqa: E731
    assert html_to_text(html, dropped, main) == "in\nthis\n"


def test_parts_and_groups_lose_nothing():
    text = "\n\n".join(f"paragraph {i} " + "word " * (i % 40) for i in range(300))
    found = list(parts(text, 2000))
    assert "".join(found) == text and len(found) == -(-len(text) // 2000)
    assert max(map(len, found)) < 2300 and min(map(len, found)) > 1500
    long = "\n".join(f"line {i}" for i in range(1000))
    assert "".join(parts(long, 500)) == long and max(map(len, parts(long, 500))) <= 520
    assert "".join(groups((f"{i}\n" for i in range(99)), 50)) == "".join(
        f"{i}\n" for i in range(99)
    )
    assert clean("a\xa0b \r\n\n\n\nc\x07 \u2010d") == "a b\n\nc -d\n"


def test_a_dictionary(tmp_path):
    entries = [
        b"00-database-info\n  about\n",
        b"Aback \\A*back\\, adv.\n   1. Toward the {back}; with\n      its {sails} set."
        b" [1913 Webster]\n"
        b"\n   Syn: backward\n        [WordNet 1.5 +PJC]\n",
        b"naive\n   caf\xe9 words\n",  # not UTF-8
    ]
    starts = [sum(map(len, entries[:i])) for i in range(3)]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def base64(n):
        return (base64(n // 64) if n >= 64 else "") + digits[n % 64]

    words = ("00-database-info", "aback", "naive")
    lines = [
        f"{w}\t{base64(s)}\t{base64(len(e))}\n"
        for w, s, e in zip(words, starts, entries, strict=True)
    ]
    lines.insert(1, lines[1].replace("aback", "backward"))  # two words, one entry
    folder = tmp_path / "usr/share/dictd"
    write(folder / "d.index", "".join(lines).encode())
    write(folder / "d.dict.dz", gzip.compress(b"".join(entries)))
    assert list(readers.dictionary(tmp_path)) == [
        (
            "d.txt",
            "Aback \\A*back\\, adv.\n1. Toward the back; with its sails set.\nSyn: backward\n\n"
            "naive café words\n",
        )
    ]


def test_records_and_fortunes(tmp_path):
    root = tmp_path / "usr/share/iso-codes/json"
    france = {"alpha_2": "FR", "alpha_3": "FRA", "flag": "F", "name": "France", "numeric": "250"}
    write(root / "iso_3166-1.json", json.dumps({"3166-1": [france]}).encode())
    place = {"code": "FR-75", "name": "Paris", "type": "City"}
    write(root / "iso_3166-2.json", json.dumps({"3166-2": [place]}).encode())
    assert list(readers.iso_codes(tmp_path)) == [
        ("iso_3166-1.txt", "France: alpha-2 FR, alpha-3 FRA, numeric 250\n"),
        ("iso_3166-2.txt", "Paris: code FR-75, type City, country France\n"),
    ]
    folder = tmp_path / "usr/share/games/fortunes"
    write(folder / "law", b"One.\n%\n\tTwo,\nlines.\n%\n")
    write(folder / "law.dat", b"\0")
    assert list(readers.fortunes(tmp_path)) == [("law.txt", "One.\n\n        Two,\nlines.\n")]


def test_git_pages(tmp_path):
    page = b"git-x(1)\n========\n\n[verse]\n'git x' --a::\n\tDoes it.\n+\ninclude::y.txt[]\nMore.\n"
    write(tmp_path / "usr/share/doc/git-doc/howto/git-x.txt", page)
    assert list(readers.asciidoc(tmp_path)) == [
        ("howto-git-x.txt", "git-x(1)\n\n'git x' --a::\n\tDoes it.\nMore.\n")
    ]


def test_shares_are_equal_where_there_is_enough():
    assert equal_shares({"a": 10, "b": 500, "c": 400}, 310) == {"a": 10, "c": 150, "b": 150}
    assert equal_shares({"a": 10, "b": 5}, 100) == {"a": 10, "b": 5}


def test_a_selection_and_its_manifest(tmp_path, capsys):
    for package, count in (("big", 40), ("small", 3), ("updated", 3)):
        for i in range(count):
            write(tmp_path / "text" / package / f"{i}.txt", f"{package} {i}".encode() * 10)
    for name in ("one", "two"):
        select(tmp_path / "text", tmp_path / name, 1000, ["small", "big"])
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "text")
    assert len(list((tmp_path / "one/small").iterdir())) == 3
    assert not (tmp_path / "one/updated").exists()
    sizes = [f.stat().st_size for f in (tmp_path / "one").rglob("*.txt")]
    assert 900 < sum(sizes) <= 1000
    write_manifest(tmp_path / "one", {"big": "1.0", "small": "2:3"})
    record = json.loads((tmp_path / "one.manifest.json").read_text())
    assert record["documents"] == len(sizes) and record["bytes"] == sum(sizes)
    assert record["contents"]["small"]["version"] == "2:3"
    assert record["contents"]["small"]["sha256"] == digest(tmp_path / "one/small")
    assert record["sha256"] in capsys.readouterr().out


def test_the_digest_by_hand(tmp_path):
    write(tmp_path / "b.txt", b"two")
    write(tmp_path / "a/c.txt", b"one")
    text = b"a/c.txt\x003\x00one" + b"b.txt\x003\x00two"
    assert digest(tmp_path) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("       indented", "indented"),
        ("           code   wide", "    code  wide"),
        ("│ a    │ b │", "a | b"),
        ("├────┼───┤", ""),
    ],
)
def test_lines_of_man_pages(line, text):
    assert readers._unframed(line) == text
