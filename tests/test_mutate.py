"""The mutation tester: what it changes in a text, and that its lists are of things that exist."""

from __future__ import annotations

import ast
import sys
import tomllib

import pytest

from tests.conftest import ROOT

SOURCE = '''"""Module of 1 < 2."""
from math import floor
__all__ = ["f"]

@cached(size=3)
def f(x: Array[1], *, flag: bool = True) -> Array[2]:
    """Not 3 + 4."""
    if x < 1 and not flag:
        return jnp.minimum(x, -x)
    total = 0.5
    total += g(x, y, mode="fill", sorted=False)
    x.slot = f"{x + 1}"
    log(x)
    return jnp.sum(x.at[total].add(jnp.zeros(2, jnp.int32)))
'''
# What the line becomes, for every line that is changed.
WANTED = {
    "def f": ["flag: bool = False"],
    "if x < 1": [
        "x <= 1 and not flag",
        "x < 1 or not flag",
        "if (not (x < 1 and not flag))",
        "x < 2 and",
        "x < 0 and",
        "x < 1 and (flag)",
    ],
    "return jnp.minimum": ["pass", "jnp.maximum(x, -x)", "jnp.minimum(x, (x))"],
    "total = 0.5": ["total = 1.5"],
    "total += g": [
        "total -= g",
        "pass",
        'g(y, x, mode="fill", sorted=False)',
        "g(x, y, sorted=False)",
        'g(x, y, mode="fill", sorted=True)',
    ],
    "x.slot": ["pass"],
    "log(x)": ["pass"],
    "return jnp.sum": [
        "jnp.mean(x.at",
        "].set(jnp",
        "jnp.ones(2",
        "zeros(3, ",
        "zeros(1, ",
        "jnp.uint32",
        "jnp.zeros(jnp.int32, 2)",
    ],
}


@pytest.fixture
def tool(monkeypatch):
    """scripts/mutate.py as a module; its environment is given back."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("JAX_PLATFORMS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "cpu")
    import mutate

    yield mutate
    for name in ("mutate", "mutants"):
        sys.modules.pop(name)


def test_every_kind_of_fault_once(tool):
    """And none in texts, annotations, decorators, imports or names of the module itself."""
    found = tool.mutants(SOURCE)
    wanted = [(line, part) for line, parts in WANTED.items() for part in parts]
    assert len(found) == len(wanted), [m.id for m in found]
    for line, part in wanted:
        fitting = [
            m
            for m in found
            if m.id.split(": ", 1)[1].startswith(line) and part in m.id.split("=> ")[1]
        ]
        assert fitting, (line, part)
    assert len({m.id for m in found}) == len(found)


@pytest.mark.parametrize(
    "module", ["training/step", "memory/exchange", "serve/scheduler", "memory/row_gradients"]
)
def test_the_modules_have_enough_mutants(tool, module):
    """At least 50, each one a program, and another one than the module."""
    source = (ROOT / "engram_jax" / f"{module}.py").read_text()
    found = tool.mutants(source)
    assert len({m.id for m in found}) == len(found) >= 50
    for mutant in found[::10]:
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))
    for tests in tool.COVERING[module]:
        assert (ROOT / tests.path.split("::")[0]).is_file()


def test_only_mutants_that_exist_are_excused(tool):
    """By the text of their lines: an excuse does not outlive what it speaks of."""
    excused = tomllib.loads(tool.EXCUSED.read_text())["excused"]
    for module in {one["module"] for one in excused}:
        source = (ROOT / "engram_jax" / f"{module}.py").read_text()
        found = {m.id for m in tool.mutants(source)}
        assert {one["mutant"] for one in excused if one["module"] == module} <= found
    assert all(len(one["reason"]) > 20 for one in excused)
