"""Files, JSON lines -> documents: nothing unusable gets in, nothing is left out uncounted."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.data import json_text
from engram_jax.data import source_report as why
from engram_jax.data.documents import Spool, add_file, split_text
from engram_jax.data.json_text import add_json_lines
from engram_jax.data.source_report import SourceReport


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "spool", SourceReport())
    yield spool
    spool.close()


def texts(spool: Spool) -> list[str]:
    return [text.decode() for text in spool.read(np.arange(len(spool)))]


@pytest.mark.parametrize("limit", [64, 67, 100, 1000, 5000])
@pytest.mark.parametrize(
    "text",
    [
        "line one\nline two is longer\n" * 40,
        "no line ends but spaces " * 40,
        "x" * 1000,
        "ж" * 700,
        "\U0001f600" * 300,
        "\n" * 500 + "end",
    ],
)
def test_cut_pieces_join_to_the_text_and_are_valid(text, limit):
    pieces = list(split_text(text.encode(), limit))
    assert b"".join(pieces) == text.encode()
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece in pieces:
        piece.decode()


def test_cut_prefers_line_ends():
    pieces = list(split_text(b"aaaa bbbb\ncccc dddd\n" * 8, 64))
    assert all(piece.endswith(b"\n") for piece in pieces)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129, 5000])
def test_a_file_is_read_whole_in_pieces(spool, tmp_path, size):
    rng = np.random.default_rng(size)
    text = "".join(rng.choice(list("abcdefgh \n"), size=size - 1)) + "z"
    (tmp_path / "a.txt").write_text(text)
    add_file(spool, tmp_path / "a.txt", "a.txt", 7, 64)
    lost = sum(tally.bytes for tally in spool.report.skipped.values())  # repeated or blank pieces
    assert sum(map(len, texts(spool))) + lost == size
    if not lost:
        assert "".join(texts(spool)) == text
    assert set(spool.origins) == {7}
    assert spool.report.cut_documents == (size > 64)


def test_byte_order_mark_is_not_text(spool, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"word " * 100)
    add_file(spool, tmp_path / "bom.txt", "bom.txt", 0, 64)
    assert texts(spool)[0].startswith("word")
    lost = spool.report.skipped[why.DUPLICATE].bytes
    assert sum(map(len, texts(spool))) + lost == 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", why.EMPTY),
        (b" \n\t\n", why.EMPTY),
        (b"caf\xe9 au lait", why.NOT_UTF8),
        (b"\x7fELF\x00\x01\x02", why.BINARY),
        ("text".encode("utf-16"), why.BINARY),
    ],
)
def test_unusable_files_are_counted(spool, tmp_path, content, reason):
    (tmp_path / "f").write_bytes(content)
    add_file(spool, tmp_path / "f", "f", 0, 1000)
    assert len(spool) == 0
    tally = spool.report.skipped[reason]
    assert (tally.count, tally.bytes, tally.examples) == (1, len(content), ["f"])


@pytest.mark.parametrize("at", [0, 63, 64, 65, 900, 3_000_000])
def test_a_nul_anywhere_makes_a_file_binary(spool, tmp_path, at):
    """However it would be cut (here in pieces of 64 bytes)."""
    content = bytearray(b"a line of text\n" * (at // 15 + 10))
    content[at] = 0
    (tmp_path / "f").write_bytes(content)
    add_file(spool, tmp_path / "f", "f", 0, 64)
    assert len(spool) == 0
    (reason,) = spool.report.skipped
    tally = spool.report.skipped[reason]
    assert (reason, tally.count, tally.bytes) == (why.BINARY, 1, len(content))


def test_one_bad_piece_costs_only_itself(spool, tmp_path):
    good = b"".join(b"line %d\n" % i for i in range(100))
    (tmp_path / "f").write_bytes(good + b"\xff\n" * 32 + good.upper())
    add_file(spool, tmp_path / "f", "f", 0, 256)
    tally = spool.report.skipped[why.NOT_UTF8]
    assert 1 <= tally.count <= 2
    assert sum(map(len, texts(spool))) + tally.bytes == 2 * len(good) + 64


def test_duplicates_are_dropped_and_counted(spool, tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("same text")
        add_file(spool, tmp_path / name, name, 0, 1000)
    assert texts(spool) == ["same text"]
    assert spool.report.skipped[why.DUPLICATE].count == 2


def test_json_lines(spool, tmp_path):
    lines = [
        b'{"text": "first"}',
        b"",
        b'{"text": "second", "id": 3}',
        b"{broken",
        b"[1, 2]",
        b'{"body": "no key"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b"[" * 100_000,
        b'{"text": "last, no line end"}',
    ]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    origin, keys = add_json_lines(spool, tmp_path / "f.jsonl", "f.jsonl", 10, "text", 1000)
    assert texts(spool) == ["first", "second", "last, no line end"]
    assert keys == {"body": 1}
    assert origin == 10 + 5  # three documents, the empty one and the surrogate's
    counts = {reason: tally.count for reason, tally in spool.report.skipped.items()}
    assert counts == {
        why.BAD_JSON: 3,
        why.NO_KEY: 1,
        why.NOT_TEXT: 2,
        why.EMPTY: 1,
        why.NOT_UTF8: 2,
    }
    assert spool.report.skipped[why.NO_KEY].examples == ["f.jsonl:6"]


def test_huge_json_line_is_skipped_without_being_held(spool, tmp_path, monkeypatch):
    monkeypatch.setattr(json_text, "MAX_JSON_LINE", 200)
    huge = b'{"text": "' + b"x" * 1000 + b'"}\n'
    (tmp_path / "f.jsonl").write_bytes(huge + b'{"text": "kept"}\n' + huge.strip())
    add_json_lines(spool, tmp_path / "f.jsonl", "f.jsonl", 0, "text", 1000)
    assert texts(spool) == ["kept"]
    tally = spool.report.skipped[why.LONG_LINE]
    assert (tally.count, tally.bytes) == (2, 2 * len(huge) - 1)
    assert tally.examples == ["f.jsonl:1", "f.jsonl:3"]


def test_limit_stops_and_counts_the_rest(tmp_path):
    spool = Spool(tmp_path / "spool", SourceReport(), limit=100)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 40)
        add_file(spool, tmp_path / f"{i}.txt", f"{i}.txt", i, 1000)
    assert [len(text) for text in texts(spool)] == [40, 40]
    tally = spool.report.skipped[why.OVER_LIMIT]
    assert (tally.count, tally.bytes) == (3, 120)
    spool.close()
    assert not (tmp_path / "spool").exists()


def test_report_survives_json(spool):
    spool.report.skip(why.EMPTY, "a", 3)
    spool.report.notes.append("note")
    assert SourceReport.from_dict(spool.report.to_dict()) == spool.report
    lines: list[str] = []
    spool.report.log(lines.append)
    assert any("left out 1" in line and why.EMPTY in line for line in lines)
