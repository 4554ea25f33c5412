"""Tasks in a folder, one of each of lm-eval's output types, of data that lies beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} answer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "training_split": "train",
    "fewshot_config": {"sampler": "first_n"},
    "fewshot_delimiter": "; ",
    "num_fewshot": 1,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{end}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["a", "b"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def write(
    folder: Path, name: str, about: Mapping[str, Any], **splits: Sequence[Mapping[str, Any]]
) -> None:
    """A task's file, and a file of JSON lines for each of its splits."""
    files = {}
    for split, documents in splits.items():
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        files[split] = str(file)
    data = {"dataset_kwargs": {"data_files": files}} if files else {}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(COMMON | data | about | {"task": name}))
