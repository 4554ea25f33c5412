"""Synthetic tasks in a prepared text: what is mixed in, what stays as it was, what is kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.data import prepare
from engram_jax.data.mixed_tasks import read_items
from engram_jax.tasks.mixture import Mixture

TASKS = {"names": ("copying", "arithmetic"), "share": 0.3, "test_items": 7}


def quiet(line: str) -> None:
    del line


@pytest.fixture
def text(tmp_path, helpers):
    helpers.write_folder(tmp_path / "text", 60)
    return tmp_path / "text"


def documents(prepared, split):
    store = getattr(prepared, split)
    ids = [store.tokens[a : b - 1] for a, b in itertools.pairwise(store.starts)]
    return [prepared.tokenizer.decode(i.tolist()) for i in ids]


def test_only_the_training_tokens_change(text, make_config):
    plain = prepare(make_config(text), quiet)
    lines: list[str] = []
    mixed = prepare(make_config(text, tasks=TASKS), lines.append)
    assert plain.tasks is None and "task_tokens" not in plain.summary()
    assert mixed.tokenizer_path == plain.tokenizer_path
    assert documents(mixed, "store_valid") == documents(plain, "store_valid")
    assert mixed.fingerprint != plain.fingerprint
    texts = documents(mixed, "store_train")
    of_tasks = [t for t in texts if t.startswith(("copy", "mod"))]
    assert [t for t in texts if t not in of_tasks] == documents(plain, "store_train")
    made = Mixture(make_config(text, tasks=TASKS).data.tasks, plain.report.train_bytes)
    assert of_tasks == list(made.documents())
    total = sum(len(t.encode()) for t in texts)
    assert sum(len(t) for t in of_tasks) / total == pytest.approx(0.3, abs=0.05)
    store = mixed.store_train
    sizes = np.diff(store.starts)
    tokens = sum(int(n) for n, t in zip(sizes, texts, strict=True) if t in of_tasks)
    assert mixed.tasks.tokens == tokens == mixed.summary()["task_tokens"]
    assert any(f"{tokens:,} of the training tokens" in line for line in lines)


def test_what_decides_the_tasks_decides_the_fingerprint(text, make_config):
    found = {
        prepare(make_config(text, tasks=TASKS | change), quiet).fingerprint
        for change in ({}, {"seed": 1}, {"share": 0.2}, {"test_items": 8}, {"names": ("copying",)})
    }
    assert len(found) == 5
    again = prepare(make_config(text, tasks=TASKS), quiet)
    assert again.fingerprint in found


def test_items_are_kept_without_those_whose_answer_is_in_the_text(text, make_config, tmp_path):
    first = prepare(make_config(text, tasks=TASKS), quiet).tasks.items
    copied = [item for item in first if item.task == "copying"]
    assert len(first) == 14 and len(copied) == 7
    (text / "more.txt").write_text(f"some words{copied[2].answer} and others {copied[4].answer}\n")
    tasks = prepare(make_config(text, tasks=TASKS), quiet).tasks
    answers = [item.answer for item in tasks.items if item.task == "copying"]
    kept = [item.answer for i, item in enumerate(copied) if i not in (2, 4)]
    assert answers[:5] == kept and len(answers) == 7
    file = tmp_path / "items.json"
    file.write_text(tasks.stored())
    read = read_items(file)
    assert read.items == tasks.items and read.train_tokens == len(tasks.train)


def test_refusals(tmp_path, make_config):
    def refused(line, **tasks):
        with pytest.raises(UserError, match=line):
            make_config(tmp_path, tasks=tasks)

    refused(
        r"data\.tasks\.names = \('cooking',\): must be different ones of facts", names=("cooking",)
    )
    refused(r"data\.tasks\.names", names=("copying", "copying"))
    refused(r"data\.tasks\.difficulties", names=("copying",), difficulties=())
    refused(r"data\.tasks\.share = 1\.0: must be between", names=("copying",), share=1.0)
    refused(r"data\.tasks\.share = 0\.3: must be left out while", share=0.3)
    refused(r"data\.tasks\.frequencies", names=("facts",), frequencies=(4, 1))
    refused(r"frequencies = \(2,\): must be left out without", names=("copying",), frequencies=(2,))
    refused(r"data\.tasks\.test_items = 0: must be positive", names=("copying",), test_items=0)
    with pytest.raises(UserError, match=r"trained without config\.data\.tasks"):
        read_items(tmp_path / "task_items.json")
