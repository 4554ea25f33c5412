"""The embedded text's packages: what this project needs to run, whatever else is installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from engram_jax.data import installed
from engram_jax.data.installed import needed
from engram_jax.data.local_text import LocalText
from engram_jax.data.report import SourceReport

DISTRIBUTIONS = {
    "root-project": ["Alpha_One>=1", 'beta; extra == "test"', 'gamma; python_version < "3"'],
    "alpha.one": ["delta[more]", "not-installed", "root-project"],
    "beta": [],
    "gamma": [],
    "delta": ["alpha-one", 'epsilon; extra == "more"', 'zeta; extra == "most"'],
    "epsilon": [],
    "zeta": [],
    "bystander": ["root-project"],
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    for name, requirements in DISTRIBUTIONS.items():
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        lines += [f"Requires-Dist: {text}" for text in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_closure_of_the_run_time_requirements(site):
    """Through cycles, other spellings of names and the extras of others, not through its own."""
    names = [package.metadata["Name"] for package in needed("root-project")]
    assert names == ["alpha.one", "delta", "epsilon"]


def test_a_clone_that_is_not_installed_reads_pyproject(monkeypatch):
    wanted = [package.metadata["Name"] for package in needed()]
    original = installed.distribution

    def uninstalled(name):
        if name == installed.PROJECT:
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(installed, "distribution", uninstalled)
    assert [package.metadata["Name"] for package in needed()] == wanted
    assert {"jax", "jaxlib", "numpy", "tokenizers"} <= set(wanted)


def test_test_tools_are_not_in_the_embedded_text(make_config):
    """`make demo`, then `make test`, then `make demo` again: the text must still be the same."""
    config = make_config("", source="local", max_megabytes=200)  # all there is
    files = LocalText(config.data, SourceReport()).files
    found = {file.name.split("/")[1].split("-")[0] for file in files["packages"] + files["prose"]}
    assert {"jax", "numpy", "optax"} <= found
    assert importlib.metadata.distribution("pytest")  # installed, like the others
    for tool in ("pytest", "_pytest", "mypy", "mypyc", "xdist", "pytest_xdist", "pip"):
        assert tool not in found
