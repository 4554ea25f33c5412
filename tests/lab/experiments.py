"""A small experiment: what configs/experiments/ declares, at a size that trains in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from engram_jax.checkpoint.run_record import add_launch
from engram_jax.checkpoint.workdir import HELD_OUT_DOCUMENTS
from engram_jax.data.token_store import TokenStore
from engram_jax.evaluation import target_losses
from engram_jax.evaluation.target_losses import ORDERS, SeenContexts
from engram_jax.lab.experiment import Experiment
from engram_jax.lab.sweep import load_experiment
from tests.runs import ROOT, SMALL, environment

_TEXT = '''"""Tables of two sizes beside a model without memory."""

import json

from configs import engram_tiny
from engram_jax.lab.experiment import Experiment, Point

VALUES = json.loads({values!r})


def base():
    config = engram_tiny.get_config()
    for key, value in VALUES.items():
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({{key: value}})
    return config


def build(point):
    config = base()
    if point.value == 0:
        config.model.engram.layers = ()
    elif point.value == 13:  # a run that fails: no such folder of text
        config.data.path = "/none/such"
    else:
        config.model.engram.rows_per_head = (point.value,)
    return config


def point(rows):
    return Point("rows", rows, "tables" if rows else "none", "Engram" if rows else "MoE")


EXPERIMENT = Experiment(
    name="small",
    title="Small tables",
    base=base,
    build=build,
    points=tuple(point(rows) for rows in {rows}),
    baseline="rows=0",
    seeds=(0, 1),
    rates={{"MoE": (0.01, 0.02), "Engram": (0.01, 0.02)}},
    tune={{"MoE": "rows=0", "Engram": "rows={tune}"}},
    axis="rows of all tables",
    column="rows",
    log_axis=True,
)


def get_config(argument=""):
    return EXPERIMENT.config(argument)
'''


def write_experiment(path: Path, corpus: Path, rows=(0, 50, 101), **overrides) -> Path:
    """The experiment's file. overrides: keys with "__" for "."."""
    places = {"data.path": str(corpus), "data.cache_dir": f"{corpus}-cache"}
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    values = {**SMALL, **places, "train.count_models": False, **changed}
    path.write_text(_TEXT.format(values=json.dumps(values), rows=tuple(rows), tune=rows[1]))
    return path


def experiment(path: Path) -> Experiment:
    return load_experiment(str(path))


def sweep_process(file: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    """`launch.py --mode=sweep` as a process of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=sweep", f"--config={file}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}", *arguments],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": os.fspath(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(plan, launch, loss: float, *, digest: str = "d1", seconds: float = 100.0) -> Path:
    """Leave in the launch's workdir what a finished run leaves, with this held-out loss."""
    config, workdir = plan.config(launch), plan.workdir(launch)
    add_launch(workdir, config, {"digest": digest})
    text = {"of": "the whole held-out split", "batches": 3, "targets": 600}
    losses = {
        "step": config.train.steps,
        "held_out_loss": {**text, "nats_per_token": {config.name: loss, "unigram counts": 9.0}},
        "data": {"digest": digest},
    }
    (workdir / "losses.json").write_text(json.dumps(losses))
    account = {"resumed_at": 0, "seconds": seconds, "training_seconds": seconds / 2, "saved": {}}
    (workdir / "goodput.json").write_text(json.dumps({"launches": [account]}))
    return workdir


def write_documents(workdir: Path, nats: np.ndarray, targets: np.ndarray, orders=ORDERS) -> None:
    """held_out_documents.npz, as the end of a run writes it.

    nats, targets: [documents], targets multiples of 4. Of every document's targets the first half
    have a third of the others' loss. Contexts of 2 tokens were seen before that half, those of 3
    tokens before its own first half, those of 4 tokens nowhere.
    """
    folder = workdir / "store"
    folder.mkdir()
    np.zeros(int((targets + 1).sum()), np.uint16).tofile(folder / "tokens.bin")
    np.save(folder / "starts.npy", np.cumsum([0, *(targets + 1)]))
    (folder / "store.json").write_text('{"dtype": "uint16", "eos_id": 0, "text_bytes": 1}')
    share = np.concatenate([(np.arange(n) + 0.5) / n for n in targets])  # of the document before it
    mean = np.repeat(nats / targets, targets)
    until = {2: 0.5, 3: 0.25, 4: 0.0}
    flags = share[:, None] < np.array([until[order] for order in orders])
    target_losses.write_documents(
        workdir / HELD_OUT_DOCUMENTS,
        TokenStore(folder),
        mean * np.where(share < 0.5, 0.5, 1.5),
        SeenContexts(tuple(orders), flags, 1),
        24,
    )
