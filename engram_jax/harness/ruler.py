"""RULER (arXiv 2404.06654) by lm-eval's own tasks: prompts by its code, for this model's tokenizer.

Lengths are asked for (`--ruler_lengths`), and what lm-eval would download may lie in a folder
(`--ruler_data`). lm-eval counts a part of a prompt's tokens only: here its prompt, the beginning of
the answer and the room for its rest are counted, and what the model cannot read at once is left
out and counted.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_json
from engram_jax.harness import ruler_build
from engram_jax.harness.ruler_build import MANIFEST

DEFAULT = (4096,)  # lm-eval's
TASKS = Path(lm_eval.tasks.__file__).parent / "ruler"

Config = Mapping[str, Any]  # of a task, as it is in lm-eval's file


class Reads(NamedTuple):
    """How the model reads. capacity: tokens at once, prompt and answer."""

    tokenizer: Any
    capacity: int


@dataclass(frozen=True)
class RulerAsked:
    """lengths: tokens of the prompts; () = lm-eval's. data: a folder with what lm-eval would
    download; None = it does."""

    lengths: tuple[int, ...] = ()
    data: Path | None = None


@dataclass
class Built:
    """Documents by task and length; why there are none; and, for the results, how many there are
    (`told`: task -> length -> {"built", "scored"}) and where the texts are from (`data`)."""

    lengths: tuple[int, ...]
    documents: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    told: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def about(self, names: Sequence[str]) -> dict[str, Any]:
        """What the results say of some tasks."""
        told = {name: self.told[name] for name in names if name in self.told}
        return {"lengths": list(self.lengths), "documents": told, "data": self.data}


def is_ruler(config: Config | None) -> bool:
    """Whether a task's configuration is one of lm-eval's RULER."""
    return config is not None and Path(str(config.get("custom_dataset"))).parent == TASKS


def build(
    configs: Sequence[Config],
    asked: RulerAsked,
    reads: Reads,
    limit: float | None,
    tell: Callable[[str], None] = lambda line: None,
    seconds: Callable[[int], int] = lambda length: 20 + length // 30,
) -> Built:
    """The documents of tasks. limit: of each length, a count or a share; None = lm-eval's 500.
    tell: is given lines about the progress. seconds: of processor time for a length.

    Raises UserError for lengths that the model cannot read, or a folder that is not there.
    """
    lengths = asked.lengths or DEFAULT
    if over := [length for length in lengths if length > reads.capacity]:
        raise UserError(
            f"--ruler_lengths={over[0]}{'' if asked.lengths else ', the default'}: must be at most"
            f" {reads.capacity}, the tokens that the model reads at once (config.serve.capacity)"
        )
    built = Built(lengths)
    if asked.data is not None:
        built.data = _sources(asked.data)
    whole = limit is not None and limit >= 1
    wanted = [(config, length) for config in configs for length in lengths]
    jobs = []
    for config, length in wanted:
        module, function = Path(str(config["custom_dataset"])).name.split(".")
        jobs.append([module, function, length, seconds(length)])
    with tempfile.TemporaryDirectory(prefix="engram-ruler-") as folder:
        reads.tokenizer.save(os.path.join(folder, "tokenizer.json"))
        settings = {
            "tokenizer": os.path.join(folder, "tokenizer.json"),
            "special": not reads.tokenizer.encode_special_tokens,
            "data": None if asked.data is None else str(asked.data.absolute()),
            "samples": int(limit) if whole and limit is not None else None,
            "jobs": jobs,
            "output": folder,
        }
        Path(folder, "settings.json").write_text(json.dumps(settings))
        for (config, length), answer in zip(wanted, _answers(folder, len(jobs)), strict=True):
            name = str(config["task"])
            if "error" in answer:
                why = shown(answer["error"], quoted=False, most=300)
                built.errors[f"{name} at {length:,} tokens"] = why
                continue
            found = [d for d in json.loads(Path(answer["file"]).read_text()) if d["outputs"]]
            if not found:  # lm-eval's common words of an empty list
                why = "lm-eval's prompts ask about nothing; the smallest that does is longer"
                built.errors[f"{name} at {length:,} tokens"] = why
                continue
            tell(f"{name}: {len(found)} prompts of at most {length:,} tokens")
            if limit is not None and not whole:
                found = found[: math.ceil(len(found) * limit)]
            built.documents.setdefault(name, {})[length] = found
    return built


def _answers(folder: str, count: int) -> Iterator[dict[str, str]]:
    """What the building process says of each job."""
    log = Path(folder, "log")
    command = [sys.executable, "-P", ruler_build.__file__, os.path.join(folder, "settings.json")]
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            said = 0
            for line in process.stdout:
                said += 1
                yield json.loads(line)
            process.wait()
        finally:
            if process.poll() is None:  # the caller was interrupted
                os.killpg(process.pid, signal.SIGKILL)  # with the build that goes on
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for _ in range(said, count):
        yield {"error": f"the process that builds prompts ended: {(lines or ['no reason'])[-1]}"}


def load(
    manager: TaskManager,
    name: str,
    configs: Sequence[Config],
    built: Built,
    reads: Reads,
    warn: Callable[[str], None],
) -> list[Any]:
    """lm-eval's tasks over documents that are built, or its group of them; [] if there are none.

    warn: is given a line for each length of which prompts are left out.
    """
    tasks = [
        task
        for config in configs
        if built.documents.get(str(config["task"]))
        for task in [_task(manager, config, built, reads, warn)]
        if task is not None
    ]
    entry = manager.task_index[name]
    if entry.kind.name != "GROUP" or not tasks:
        return tasks
    metrics = [{"metric": str(length), "weight_by_size": False} for length in built.lengths]
    about = (entry.cfg or {}).get("metadata")
    group = Group.from_config({"group": name, "aggregate_metric_list": metrics, "metadata": about})
    for task in tasks:
        group.add(task)
    return [group]


def _task(
    manager: TaskManager,
    config: Config,
    built: Built,
    reads: Reads,
    warn: Callable[[str], None],
) -> Any:
    """A task over its documents that the model can read; None if there are none."""
    name = str(config["task"])
    by_length = built.documents[name]
    documents = [document for found in by_length.values() for document in found]
    splits = {"test": datasets.Dataset.from_list(documents)}
    made = dict(config) | {
        "custom_dataset": lambda **about: splits,
        "process_results": _of_own_length(_function(str(config["process_results"]))),
        "metric_list": [
            {"metric": str(length), "aggregation": "mean", "higher_is_better": True}
            for length in built.lengths
        ],
    }
    (task,) = manager.load([made])["tasks"].values()
    answer = task.config.generation_kwargs["max_gen_toks"]
    texts = [
        task.fewshot_context(document, 0, gen_prefix=task.doc_to_prefix(document))
        for document in documents
    ]
    sizes = [len(one.ids) + answer for one in encode_batch(reads.tokenizer, texts)]
    kept = [d for d, size in zip(documents, sizes, strict=True) if size <= reads.capacity]
    for length, found in by_length.items():
        left = sum(document["max_length"] == length for document in kept)
        told = built.told.setdefault(name, {})
        told[str(length)] = {"built": len(found), "scored": left}
        if left < len(found):
            longer = (
                f"with the answer longer than the {reads.capacity:,} tokens that the model reads"
                " at once"
            )
            if left:
                count = f"{len(found) - left} of {len(found)} prompts are left out"
                warn(f"{name} at {length:,} tokens: {count}: {longer}")
            else:
                built.errors[f"{name} at {length:,} tokens"] = f"all {len(found)} prompts: {longer}"
    if not kept:
        return None
    splits["test"] = datasets.Dataset.from_list(kept)
    return task


def _function(path: str) -> Callable[[Any, Any], dict[str, float]]:
    """A function of lm-eval's common_utils, from its place as a task's file gives it."""
    return getattr(ruler_build.common_utils(), Path(path).name.split(".")[1])


def _of_own_length(
    score: Callable[[Any, Any], dict[str, float]],
) -> Callable[[Any, Any], dict[str, float]]:
    """Without lm-eval's -1 for the lengths that a document does not have."""

    def process_results(doc: Any, results: Any) -> dict[str, float]:
        length = str(doc["max_length"])
        return {length: score(doc, results)[length]}

    return process_results


def _sources(folder: Path) -> dict[str, Any]:
    """For each part of the folder its source, as its manifest says it."""
    if not folder.is_dir():
        raise UserError(f"--ruler_data={shown(folder)}: no such folder")
    file = folder / MANIFEST
    told = read_json(file).get("parts", {}) if file.is_file() else {}
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST, "README.md"):
            continue
        about = told.get(path.name)
        if isinstance(about, dict) and about.get("sha256") == ruler_build.digest(path):
            found[path.name] = {"source": about.get("source"), "original": about.get("original")}
        else:
            found[path.name] = {"source": f"as given; {MANIFEST} does not tell", "original": None}
    return found
