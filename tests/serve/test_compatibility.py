"""What is served together: rows and weights of one checkpoint, no longer than it was trained."""

from __future__ import annotations

import dataclasses

import pytest

from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.memory.store.memory_file import MemoryFile, open_memory, write_memory
from engram_jax.serve.compatibility import check_memory_file, for_one, origin, with_capacity
from engram_jax.serve.engine_steps import EngineSteps
from tests.memory.store.tables import FORMATS, numbers
from tests.serve.served import model, prompts, served

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def trained() -> LoadedModel:
    return LoadedModel(*model(), None, -1, 400, "seed1", DIGEST, 48)


@pytest.fixture
def warned() -> list[str]:
    return []


def file_that_says(tmp_path, about: dict[str, str]) -> MemoryFile:
    path, form = tmp_path / "memory", FORMATS[0]
    write_memory(path, {"1": (form, 3, [numbers(form, 3)])}, "f", about)
    return open_memory(path)


def test_rows_of_the_same_checkpoint(trained, warned, tmp_path):
    """Wherever it lies and whatever its configuration is called now."""
    file = file_that_says(tmp_path, origin(trained))
    for other in (trained, dataclasses.replace(trained, run="moved")):
        check_memory_file(file, other, ServeConfig(memory_file="F"), warned.append)
    assert warned == []


@pytest.mark.parametrize("change", [{"step": 200, "digest": "c" * 64}, {"digest": "c" * 64}])
def test_rows_of_another_checkpoint(trained, warned, tmp_path, change):
    """Of another step, or of another run's same step; the key turns the error into a warning."""
    file = file_that_says(tmp_path, origin(dataclasses.replace(trained, **change)))
    step = change.get("step", 400)
    with pytest.raises(UserError) as caught:
        check_memory_file(file, trained, ServeConfig(memory_file="F"), warned.append)
    line = (
        f"F: holds the rows of unnamed, run seed1, step {step}, checkpoint cccccccccccc; the"
        " weights are those of unnamed, run seed1, step 400, checkpoint 0123456789ab"
    )
    assert str(caught.value).startswith(line + "; export it again")
    assert "config.serve.accept_other_memory=True" in str(caught.value) and warned == []
    accepting = ServeConfig(memory_file="F", accept_other_memory=True)
    check_memory_file(file, trained, accepting, warned.append)
    assert warned == [line]


@pytest.mark.parametrize("about", [{}, {"name": "unnamed", "step": "400"}])
def test_a_file_that_does_not_say(trained, warned, tmp_path, about):
    """As all were before there were digests."""
    file = file_that_says(tmp_path, about)
    check_memory_file(file, trained, ServeConfig(memory_file="F"), warned.append)
    (line,) = warned
    assert "F " in line and "was not checked" in line and "unnamed, run seed1, step 400" in line


def test_a_file_that_does_not_say_but_is_of_another_step(trained, warned, tmp_path):
    file = file_that_says(tmp_path, {"name": "unnamed", "step": "200"})
    with pytest.raises(UserError, match=r"rows of unnamed, step 200; the weights .* step 400"):
        check_memory_file(file, trained, ServeConfig(memory_file="F"), warned.append)


def test_the_capacity_is_what_was_trained(trained, warned):
    assert with_capacity(trained, ServeConfig(), warned.append).capacity == 48
    for tokens in (1, 47, 48):
        assert (
            with_capacity(trained, ServeConfig(capacity=tokens), warned.append).capacity == tokens
        )
    with pytest.raises(UserError, match=r"serve.capacity = 49: .*step 400 was .* of 48 tokens"):
        with_capacity(trained, ServeConfig(capacity=49), warned.append)
    assert warned == []
    longer = ServeConfig(capacity=49, accept_longer=True)
    assert with_capacity(trained, longer, warned.append).capacity == 49
    assert len(warned) == 1 and "serve.capacity = 49" in warned[0]
    with pytest.raises(UserError, match=r"serve.pages = 5: must be 0, .* the 6 of one"):
        with_capacity(trained, ServeConfig(page=8, pages=5), warned.append)


def test_without_a_checkpoint_the_configuration_says_it():
    """For who makes an engine of a program by hand: 20 tokens, three pages of 8."""
    program, _ = model()
    steps = EngineSteps(program, ServeConfig(page=8))
    assert (steps.serve.capacity, steps.pages_each) == (program.config.data.seq_len, 3) == (20, 3)


def test_a_continuation_is_no_longer_either(trained, warned):
    assert for_one(trained, ServeConfig(), 40, 8, warned.append).capacity == 48
    with pytest.raises(UserError, match=r"generate.max_tokens = 8, with a prompt of 41 tokens"):
        for_one(trained, ServeConfig(), 41, 8, warned.append)
    accepting = ServeConfig(accept_longer=True)
    assert for_one(trained, accepting, 41, 8, warned.append).capacity == 49
    assert len(warned) == 1


def test_a_capacity_need_not_fill_its_pages():
    """61 tokens in pages of 8: the last of them is on the eighth page."""
    given = prompts((49,))
    found, stats = served(given=given, capacity=61)
    assert (found, stats["pages"]) == (served(given=given)[0], 3 * 8)
    assert len(found[0].tokens) == 12
