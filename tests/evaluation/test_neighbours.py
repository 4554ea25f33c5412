"""Results of neighbours are kept beside each other."""

from __future__ import annotations

import json

from engram_jax.evaluation.neighbours import write_record


def test_another_step_or_index_does_not_overwrite(tmp_path):
    for saved in (4, 12):
        (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    wanted = {
        "neighbours_knn.json": ("knn", {"index": "flat"}, 12),
        "neighbours_knn_4.json": ("knn", {"index": "flat"}, 4),
        "neighbours_knn_ivf.json": ("knn", {"index": "ivf"}, 12),
        "neighbours_knn_ivf_4.json": ("knn", {"index": "ivf"}, 4),
        "neighbours_rag.json": ("rag", {"chunk_tokens": 4}, 12),
        "neighbours_rag_4.json": ("rag", {"chunk_tokens": 4}, 4),
    }
    for file, (name, settings, step) in wanted.items():
        result = {"neighbours": name, "settings": settings, "step": step}
        assert write_record(tmp_path, result) == tmp_path / file
    for file, (name, settings, step) in wanted.items():
        found = json.loads((tmp_path / file).read_text())
        assert found == {"neighbours": name, "settings": settings, "step": step}
