"""Files that a user names, or that lie in a workdir, in every wrong form: one line, no hang.

A line of a table: what is at the path (and what it holds), and what the line says.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_jax.addressing import Addressing, load_tokenizer
from engram_jax.checkpoint.load_model import read_eos_id
from engram_jax.checkpoint.run_record import read_launches
from engram_jax.checkpoint.workdir import FILES, FOLDERS, check_writable
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import check_output, open_file, read_json
from engram_jax.data.mixed_tasks import read_items
from engram_jax.memory.store.memory_file import open_memory
from engram_jax.memory.store.read_counts import Frequency, load_frequency, save_frequency
from engram_jax.monitoring import goodput
from engram_jax.monitoring.metrics import MetricsWriter, read_metrics
from engram_jax.report.write import write_report


@pytest.fixture(autouse=True)
def _never_waits() -> Iterator[None]:
    """What waits for a FIFO ends here, and fails."""

    def late(*_: object) -> None:
        raise TimeoutError("hung for 20 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def said(call: Callable[[], Any]) -> str:
    """The one line that the user is told: printable, short, without NumPy's advice to unpickle."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700, line
    assert "pickle" not in line
    return line


# ---- what is at the path -------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Any]] = {
    "memory file": open_memory,
    "frequency file": load_frequency,
    "tokenizer": load_tokenizer,
    "run.json": read_launches,
    "JSON": read_json,
}
AT_THE_PATH = {
    "fifo": "is a FIFO",
    "folder": "folder",
    "device": "is a device",
    "socket": "No such device",  # what opening one says
    "nothing": "o such file",
    "loop of links": "Too many levels of symbolic links",
    "link to nothing": "No such file",
    "empty": "",
    "below a file": "",
    "name with a newline": r"with\na newline",
    "name that is not UTF-8": r"name\udcff",
    "name that is too long": "...",
}


def made(what: str, folder: Path) -> Path:
    path = folder / "given"
    match what:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            return Path("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(os.path.relpath(path))
        case "loop of links" | "link to nothing":
            path.symlink_to("given" if what == "loop of links" else "gone")
        case "empty":
            path.touch()
        case "below a file":
            path.touch()
            return path / "more"
        case "name with a newline":
            return folder / "with\na newline"
        case "name that is not UTF-8":
            return folder / "name\udcff"
        case "name that is too long":
            return folder / ("x" * 5000)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", AT_THE_PATH)
def test_at_the_path(reader, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    line = said(lambda: READERS[reader](made(what, tmp_path)))
    if (reader, what) != ("tokenizer", "folder"):  # there a tokenizer.json is looked for
        assert AT_THE_PATH[what] in line


# ---- what it holds -------------------------------------------------------------------------------


def frequency(**changes: Any) -> dict[str, Any]:
    """The arrays of a frequency file of one layer of 50 rows."""
    arrays = {
        "format": np.int64(1),
        "fingerprint": np.str_("cafe"),
        "tokens": np.int64(7),
        "layers": np.array(["1"]),
        "1.ids": np.array([4, 2], np.int32),
        "1.counts": np.array([5, 1], np.int64),
        "1.table": np.array([50, 9]),
    }
    return {**arrays, **{k.replace("_", "."): v for k, v in changes.items()}}


FREQUENCIES = [
    (frequency(layers=np.array([], np.str_)), "has no layers"),
    (frequency(layers=np.array(["2"])), "lacks 2.ids"),
    (frequency(layers=np.array(["a\nb"])), r"lacks 'a\nb.ids'"),
    (frequency(layers=np.array(["x" * 9000])), "lacks xxx"),
    (frequency(layers=np.array([{}], object)), "array layers is damaged, or not of numbers"),
    (frequency(format=np.int64(2)), "format 2, this program reads 1"),
    (frequency(format=np.array([{}], object)), "array format is damaged, or not of numbers"),
    (frequency(tokens=np.str_("many")), "invalid literal"),
    (frequency(**{"1_ids": np.array([4, 50], np.int32)}), "each in 0 to 49"),
    (frequency(**{"1_ids": np.array([4, -1], np.int32)}), "each in 0 to 49"),
    (frequency(**{"1_ids": np.array([4.0, 2.0])}), "ids must be int32"),
    (frequency(**{"1_ids": np.array([[4, 2]], np.int32)}), "int32 [m]"),
    (frequency(**{"1_counts": np.array([5, 0], np.int64)}), "counts must be 1 or more"),
    (frequency(**{"1_counts": np.array([5, 5], np.int64)}), "9 together at most"),
    (frequency(**{"1_counts": np.array([1, 5], np.int64)}), "by falling count"),
    (frequency(**{"1_table": np.array([50])}), "values to unpack"),
    (frequency(**{"1_table": np.array(["a", "b"])}), "invalid literal"),
]


@pytest.mark.parametrize(("arrays", "words"), FREQUENCIES)
def test_frequency_files(arrays, words, tmp_path):
    np.savez(tmp_path / "f.npz", **arrays)
    line = said(lambda: load_frequency(tmp_path / "f.npz"))
    assert words in line and str(tmp_path) in line


NOT_NPZ = [b"", b"{", b"\x93NUMPY", b"PK\3\4", pickle.dumps({"layers": 3}), b"\0" * 4096]


@pytest.mark.parametrize("content", NOT_NPZ)
def test_frequency_files_of_other_programs(content, tmp_path):
    (tmp_path / "f").write_bytes(content)
    assert f"no .npz file, or truncated ({len(content):,} bytes)" in said(
        lambda: load_frequency(tmp_path / "f")
    )


def test_a_frequency_file_reads_back(tmp_path):
    np.savez(tmp_path / "f.npz", **frequency())
    assert load_frequency(tmp_path / "f.npz").layers["1"].ids.tolist() == [4, 2]
    layer = Frequency(np.array([4], np.int32), np.array([5], np.int64), 50, 9)
    save_frequency(tmp_path / "g", {"1": layer}, "cafe", 1)
    assert load_frequency(tmp_path / "g", "cafe").tokens == 1


TEXTS = [
    (b"{", "is no JSON, line 1"),
    (b"", "is empty"),
    (b"[]", "holds no JSON object"),
    (b"null", "holds no JSON object"),
    (b"[" * 100_000, "is no JSON"),
    (b'{"eos_id": "\xff"}', "is no UTF-8 text"),
    (b"{}", '"eos_id" is None, must be an id of the run\'s tokenizer, 0 to 299'),
    (b'{"eos_id": null}', '"eos_id" is None'),
    (b'{"eos_id": "2"}', "\"eos_id\" is '2'"),
    (b'{"eos_id": 2.0}', '"eos_id" is 2.0'),
    (b'{"eos_id": true}', '"eos_id" is True'),
    (b'{"eos_id": -1}', '"eos_id" is -1'),
    (b'{"eos_id": 300}', '"eos_id" is 300'),
]


@pytest.mark.parametrize(("content", "words"), TEXTS)
def test_text_json(content, words, tmp_path):
    (tmp_path / "text.json").write_bytes(content)
    line = said(lambda: read_eos_id(tmp_path, 300))
    assert words in line and str(tmp_path / "text.json") in line


def test_text_json_that_is_whole_or_missing(tmp_path):
    assert "No such file" in said(lambda: read_eos_id(tmp_path, 300))
    (tmp_path / "text.json").write_text('{"eos_id": 2}')
    assert read_eos_id(tmp_path, 300) == 2


RECORDS: list[tuple[Callable[[Path], Any], str, str, str]] = [
    (lambda p: read_launches(p / "run.json"), "run.json", "{", "not a record of launches"),
    (lambda p: read_launches(p / "run.json"), "run.json", "{}", "is not a record of launches"),
    (lambda p: read_launches(p / "run.json"), "run.json", '{"launches": 3}', "not a record"),
    (lambda p: read_launches(p / "run.json"), "run.json", '{"launches": [3]}', "not a record"),
    (
        lambda p: read_launches(p / "run.json"),
        "run.json",
        '{"launches": [{"resumed_at": "a"}]}',
        "not a record",
    ),
    (goodput.read, "goodput.json", "{", "not an account of launches: move it away"),
    (goodput.read, "goodput.json", '{"launches": null}', "is not an account"),
    (goodput.read, "goodput.json", '{"launches": [{}]}', "is not an account"),
    (
        goodput.read,
        "goodput.json",
        '{"launches": [{"seconds": 1, "training_seconds": 1, "saved": {"a": 1}}]}',
        "is not an account",
    ),
    (lambda p: read_items(p / "task_items.json"), "task_items.json", "[]", "no JSON object"),
    (lambda p: read_items(p / "task_items.json"), "task_items.json", "{}", "train_tokens"),
    (
        lambda p: read_items(p / "task_items.json"),
        "task_items.json",
        '{"train_tokens": 3, "items": [{}]}',
        "holds no items",
    ),
    (lambda p: write_report(p, title="x"), "losses.json", "{", "is no JSON, line 1"),
    (lambda p: write_report(p, title="x"), "losses.json", "[]", "no JSON object"),
    (lambda p: write_report(p, title="x"), "task_scores.json", "\0", "is no JSON"),
    (Addressing.load, "addressing.json", "{", "is no JSON, line 1"),
    (Addressing.load, "addressing.json", "{}", "lacks layers"),
    (Addressing.load, "addressing.json", '{"layers": 3}', "cannot be read"),
    (Addressing.load, "addressing.json", '{"layers": [], "case": true}', "addressing.npz: No such"),
]


@pytest.mark.parametrize(("read", "name", "content", "words"), RECORDS)
def test_records_in_a_workdir(read, name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    line = said(lambda: read(tmp_path))
    assert words in line and str(tmp_path) in line


LINES = [
    b"\xff\xfe\n",
    b'{"step": 2, "loss": "\xc3"}\n',
    b"{\n",
    b"[3]\n",
    b'{"step": "2"}\n',
    b'{"step": 2, "loss": "Infinitx"}\n',
    b"\0\0\0\0\n",
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_line_of_metrics_costs_no_other(line, tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 3.0})
        writer.write(3, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    first, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + third)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    with MetricsWriter(tmp_path, start_step=3) as writer:
        writer.write(4, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 4]
    for kept in path.read_text().splitlines():
        json.loads(kept)


# ---- what is to be written -----------------------------------------------------------------------

OUTPUTS = {
    "folder": "is a folder",
    "fifo": "is no file that could be replaced",
    "nowhere/x": "is no folder; make it first",
    "file/x": "is no folder; make it first",
    "x" * 300: "File name too long",
    "x" * 245: "File name too long",  # with the ending of a partial file
    "/proc/x": "cannot be written",
    "/dev/null": "is no file that could be replaced",
    "a\nb/c": r"'a\nb' is no folder",
    "": "is a folder",
}


@pytest.mark.parametrize("path", OUTPUTS)
def test_outputs_are_tested_before_hours_of_work(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    line = said(lambda: check_output("output", path))
    assert OUTPUTS[path] in line and line.startswith("--output=")
    assert sorted(os.listdir()) == ["fifo", "file", "folder"]
    check_output("output", "new")
    check_output("output", "file")
    assert sorted(os.listdir()) == ["fifo", "file", "folder"]


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_stands_where_a_run_will_write(name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    check_writable(run)
    os.mkfifo(run / name)
    kind = "file" if name in FILES else "folder"
    assert f"{name} there is no {kind}; move it away" in said(lambda: check_writable(run))


# ---- how it is shown -----------------------------------------------------------------------------

SHOWN = [
    ("plain name", "plain name"),
    ("a\nb", r"'a\nb'"),
    ("\x1b[31m", r"'\x1b[31m'"),
    ("a\udcff", r"'a\udcff'"),
    ("größe", "größe"),
    ("x" * 999, "x" * 297 + "..."),
    (3.5, "3.5"),
]


@pytest.mark.parametrize(("value", "wanted"), SHOWN)
def test_shown(value, wanted):
    assert shown(value) == wanted


def test_an_open_file_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with open_file(tmp_path / "x") as file:
        assert file.readall() == b"abc" and file.name == str(tmp_path / "x")
