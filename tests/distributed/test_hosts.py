"""The processes of a launch at its start: all there, each once, and of the same launch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from jax._src.clusters import cloud_tpu_cluster

from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.distributed import processes as distributed
from engram_jax.distributed import same_launch
from engram_jax.distributed.rendezvous import meet
from tests.moving import free_port
from tests.runs import ROOT

LAUNCH = ["launch.py", "--config=configs/engram_tiny.py", "--mode=evaluate"]


def started(folder: Path, arguments: Sequence[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


def refused(process: subprocess.Popen) -> tuple[list[str], str]:
    """(what was said before, the error line) of a process that ends as a user's mistake does."""
    out, err = ended(process)
    assert process.returncode == 2, err
    *before, last = err.splitlines()
    assert out == "" and last.startswith("error: "), err
    return before, last


def outcomes(*calls: Callable[[], None]) -> list[str]:
    """What each of these calls, made at the same time, raises; "" for nothing."""
    found = [""] * len(calls)

    def run(i: int) -> None:
        try:
            calls[i]()
        except UserError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def comers(*who: tuple[int, int, dict], seconds: float = 20) -> list[str]:
    """The outcomes for processes (number, how many, launch), all at one coordinator's address."""
    at = f"localhost:{free_port()}"
    return outcomes(*(lambda w=w: meet(at, *w, seconds) for w in who))


def test_hosts_that_differ_end_with_the_keys_and_both_values(tmp_path):
    """Options, code and JAX's settings, as two users of one machine each might have them."""
    for name in ("engram_jax", "kernels_pallas", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", tmp_path)
    with (tmp_path / "engram_jax" / "training/loss.py").open("a") as file:
        file.write("# changed\n")
    together = [f"--workdir={tmp_path / 'run'}", f"--coordinator_address=localhost:{free_port()}"]
    together += ["--num_processes=2"]
    here = ["--process_id=0", "--config.optimizer.peak_lr=0.003"]
    there = ["--process_id=1", "--config.optimizer.peak_lr=0.001", "--step=best"]
    processes = [
        started(ROOT, [*LAUNCH, *together, *here, f"--config.data.cache_dir={tmp_path}"]),
        started(tmp_path, [*LAUNCH, *together, *there], JAX_ENABLE_X64="1"),
    ]
    (_, ours), (_, theirs) = map(refused, processes)
    assert ours == theirs
    parts = ours.removeprefix("error: ").split("; ")
    assert parts[0] == "config.optimizer.peak_lr: 0.003 on process 0, 0.001 on process 1"
    assert parts[1] == "--step: 'latest' on process 0, 'best' on process 1"
    assert parts[2].startswith("digest of the code: ")
    assert parts[3] == "setting jax_enable_x64: False on process 0, True on process 1"
    assert parts[4] == "give every host the same command and code"
    assert not (tmp_path / "run").exists()


def test_a_host_that_never_starts_is_named():
    """Whichever of the two it is: a line while waiting, then one that says who is missing."""
    ports = [free_port(), free_port()]
    lonely = [
        started(
            ROOT,
            [*LAUNCH, "--workdir=/nowhere", "--num_processes=2", "--join_seconds=2", *which],
        )
        for rank, port in enumerate(ports)
        for which in [(f"--coordinator_address=localhost:{port}", f"--process_id={rank}")]
    ]
    (waited, first), (also_waited, second) = map(refused, lonely)
    assert len(waited) == len(also_waited) == 1
    assert waited[0].startswith("waiting for 1 of 2 processes (process 1): ")
    assert first.startswith("error: 1 of 2 processes (process 1) did not come within 2 s; start")
    where = f"process 0 at localhost:{ports[1]} (Connection refused)"
    assert also_waited[0].startswith(f"waiting for {where}: ")
    where = f"process 0 did not answer at localhost:{ports[1]} within 2 s (Connection refused)"
    assert second.startswith(f"error: {where}; start every process")
    assert "--join_seconds" in first and "--join_seconds" in second


def test_all_who_came_hear_who_is_missing(capfd):
    found = comers((0, 4, {}), (2, 4, {}), seconds=0.6)
    assert found[0] == found[1] != ""
    assert found[0].startswith("2 of 4 processes (processes 1 and 3) did not come within 0.6 s")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and {line.split(":")[0] for line in lines} == {
        "waiting for 2 of 4 processes (processes 1 and 3)"
    }


def test_one_that_goes_again_is_missing():
    """It hangs up while others wait; another with its number may come."""
    port = free_port()
    with socket.socket() as early:

        def go() -> None:
            while early.connect_ex(("localhost", port)):
                time.sleep(0.02)
            early.sendall(b'{"process": 1, "processes": 3, "launch": {}, "token": "early"}\n')
            early.recv(1)
            early.close()
            meet(f"localhost:{port}", 1, 3, {}, 20)

        at = f"localhost:{port}"
        calls = [
            go,
            lambda: meet(at, 0, 3, {}, 20),
            lambda: time.sleep(0.5) or meet(at, 2, 3, {}, 20),
        ]
        assert outcomes(*calls) == ["", "", ""]


def test_equal_launches_go_on():
    assert comers(*((rank, 5, {"a": (1, 2)}) for rank in range(5))) == [""] * 5


def test_strangers_at_the_port_disturb_nobody():
    port, gone = free_port(), threading.Event()

    def strangers() -> None:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n'):
            with socket.socket() as other:
                while other.connect_ex(("localhost", port)):
                    time.sleep(0.02)
                other.sendall(said)
        gone.set()

    at = f"localhost:{port}"
    calls = [lambda: meet(at, 0, 2, {}, 20), lambda: gone.wait() and meet(at, 1, 2, {}, 20)]
    assert outcomes(strangers, *calls) == ["", "", ""]


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (
            [(0, 2, {}), (1, 3, {}), (2, 3, {})],
            ["--num_processes: 2 on process 0 (host ", "), 3 on process "],
        ),
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], ["--process_id=1: given to two processes, on host"]),
        ([(0, 2, {}), (0, 2, {})], ["--process_id=0: given to two processes, on host"]),
        (
            [(0, 4, {"a": 1}), (1, 4, {"a": 1}), (2, 4, {"a": 2}), (3, 4, {"a": 2})],
            ["a: 1 on processes 0 and 1, 2 on processes 2 and 3; give every host the same"],
        ),
    ],
)
def test_all_hear_what_is_wrong(who, words):
    start = time.monotonic()
    found = comers(*who)
    assert len(set(found)) == 1, found
    assert all(word in found[0] for word in words), found
    assert time.monotonic() - start < 15  # at once: long before those who are missing are given up


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as other:
        at = f"localhost:{other.getsockname()[1]}"
        both = outcomes(lambda: meet(at, 0, 2, {}, 0.5), lambda: meet(at, 1, 2, {}, 0.5))
    assert f"{at}: port {at.split(':')[1]} of this host is in use" in both[0]
    assert f"process 0 did not answer at {at} within 0.5 s" in both[1]


def test_an_earlier_launch_at_the_port_is_waited_for():
    """Whatever answers there, process 0 may come yet; in the end it is said what did answer."""
    with socket.create_server(("localhost", 0)) as other:
        at = f"localhost:{other.getsockname()[1]}"

        def answer() -> None:
            for _ in range(2):
                visitor = other.accept()[0]
                visitor.sendall(b"\x00\x00\x12\x04\n")  # what a gRPC service begins with
                visitor.close()

        found = outcomes(lambda: meet(at, 1, 2, {}, 1), answer)[0]
    assert found.startswith(f"process 0 did not answer at {at} within 1 s (")


def test_a_launch_is_all_that_decides_a_result():
    launch = same_launch.describe_launch(Config(), {"mode": "train"})
    assert launch["--mode"] == "train"
    for key in ("config.mesh.headroom", "config.train.seed", "config.model.engram.layers"):
        assert key in launch
    for key in ("git commit", "digest of the code", "version of jaxlib", "XLA_FLAGS"):
        assert key in launch
    assert not set(same_launch.MAY_DIFFER) & set(launch)
    assert same_launch.disagreement([launch, dict(launch), launch]) == ""


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ({"git commit": "def"}, "git commit: 'abc' on process 0, 'def' on process 1"),
        ({"git commit": None}, ""),  # no git there: the code itself is compared
        ({"config.a": [1, 2]}, ""),  # what JSON makes of a tuple
        ({"config.a": [1, 3]}, "config.a: (1, 2) on process 0, (1, 3) on process 1"),
        ({"config.b": 1}, "config.b: absent on process 0, 1 on process 1"),
        ({"config.a": "x" * 200}, "x... (SHA-256 "),
    ],
)
def test_what_counts_as_a_difference(theirs, line):
    ours = {"git commit": "abc", "config.a": (1, 2)}
    found = same_launch.disagreement([ours, ours | theirs])
    assert (line in found) if line else (found == "")
    assert len(found) < 400


def test_the_code_digest_sees_code_and_nothing_else(tmp_path):
    for name in ("engram_jax/a.py", "kernels_pallas/b.json", "launch.py", "docs/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = same_launch.code_digest(tmp_path)
    (tmp_path / "docs/c.py").write_text("2")
    (tmp_path / "engram_jax/a.pyc").write_text("2")
    assert same_launch.code_digest(tmp_path) == before
    for name in ("engram_jax/a.py", "kernels_pallas/b.json", "launch.py"):
        (tmp_path / name).write_text("2")
        assert same_launch.code_digest(tmp_path) != before
        (tmp_path / name).write_text("1")
    assert same_launch.code_digest(tmp_path) == before


def as_a_worker(monkeypatch, rank: int, workers: int, port: int) -> None:
    """The environment of a worker of a TPU slice on GKE, which names its hosts."""
    monkeypatch.setattr(distributed, "_on_tpu", lambda: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(["localhost"] * workers))
    monkeypatch.setenv("TPU_WORKER_ID", str(rank))
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
    for name, value in (
        ("COORDINATOR_ADDRESS", "localhost"),
        ("NUM_SLICES", "1"),
        ("SLICE_ID", "0"),
    ):
        monkeypatch.setenv(f"MEGASCALE_{name}", value)  # or a server of Google's is asked


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slice_whose_other_host_never_starts(rank, monkeypatch):
    """The same two lines where no address is given and JAX finds the slice's hosts by itself."""
    as_a_worker(monkeypatch, rank, 2, free_port())
    missing = ("process 0 did not answer at localhost:", r"1 of 2 processes \(process 1\)")[
        1 - rank
    ]
    with pytest.raises(UserError, match=missing):
        distributed.join(None, None, None, seconds=0.5)


def test_two_join_past_a_proxy(tmp_path):
    """To the end: JAX's own joining, which http_proxy alone would make a wait in vain."""
    program = (
        "import sys, jax; from engram_jax.distributed import processes;"
        "processes.join(sys.argv[1], 2, int(sys.argv[2]), lambda: {'a': 1}, 60);"
        "print(jax.process_index(), jax.process_count())"
    )
    at = f"127.0.0.1:{free_port()}"
    both = [
        started(ROOT, ["-c", program, at, str(rank)], http_proxy="http://127.0.0.1:9")
        for rank in range(2)
    ]
    for rank, process in enumerate(both):
        out, err = ended(process)
        assert process.returncode == 0, err
        assert out == f"{rank} 2\n"
        assert "proxy" not in err
