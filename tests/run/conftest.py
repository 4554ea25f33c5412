"""One corpus and one finished run for all tests of this folder (in each worker)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import launched, small_run, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def undisturbed(corpus, tmp_path_factory) -> Path:
    """The workdir of a run nobody interrupted; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    outcome = launched(*small_run(corpus, workdir))
    assert outcome.code == 0, outcome.err
    return workdir
