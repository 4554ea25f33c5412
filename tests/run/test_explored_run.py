"""--mode=explore of a run that launch.py trained: its text counted, and the page as a process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from engram_jax.checkpoint.load_model import load_model
from engram_jax.config.errors import UserError
from engram_jax.data.run_data import open_data
from engram_jax.explore.training_text import MISSING, TrainingText, count_training_text
from tests.oracle.engram import hash_rows
from tests.runs import ROOT, environment, small_config, small_run, write_corpus
from tests.serve.web import Client


@pytest.fixture(scope="module")
def loaded(corpus, undisturbed):
    config = small_config(corpus)
    return config, undisturbed, load_model(config, undisturbed)


@pytest.mark.parametrize("batches", [5, 24])
def test_the_training_text_is_counted(loaded, batches):
    """Reads of every row, against a loop over the documents of the batches that training read."""
    config, _, trained = loaded
    data = config.data
    most = batches * data.batch_size * data.seq_len + 7
    found = count_training_text(*loaded, most if batches < trained.step else 10**9)
    training = open_data(config, lambda line: None).train_iterator()
    read = {}  # sequence -> its tokens and segments; each is counted once
    for _ in range(trained.step):
        batch = next(training)
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            read.setdefault(tokens.tobytes(), (len(read), tokens, segments))
        if len(read) <= batches * data.batch_size:
            counted = list(read.values())
    addressing, reads = trained.program.addressing, Counter()
    layer = addressing.layers[1]
    for _, tokens, segments in counted:
        for number in np.unique(segments):
            ids = addressing.compression[tokens[segments == number]]
            reads.update(hash_rows(ids, layer, addressing.pad_id).ravel())
    assert found.tokens == len(counted) * data.seq_len
    assert found.of == len(read) * data.seq_len
    for offset, size in zip(layer.offsets, layer.head_sizes, strict=True):
        told = [found.readers[1].of(row, 1).reads for row in range(offset, offset + size)]
        assert told == [reads[row] for row in range(offset, offset + size)]
        assert sum(told) == found.tokens


def test_another_text_is_not_counted(loaded, tmp_path):
    _, workdir, trained = loaded
    other = small_config(write_corpus(tmp_path / "text", documents=12))
    with pytest.raises(UserError, match=r"tokenizer \w+ \(of this data\) differs"):
        count_training_text(other, workdir, trained, 100)
    gone = small_config(tmp_path / "not there")
    told: list[str] = []
    text = TrainingText(lambda: count_training_text(gone, workdir, trained, 100), told.append)
    text.start()
    text._thread.join(30)
    assert text.state == MISSING and text.counted is None and told == [text.line]
    assert text.line.startswith("no counts of training text: ") and "not there" in text.line


@pytest.mark.slow
@pytest.mark.proof
def test_the_page_as_a_process(corpus, undisturbed):
    arguments = [*small_run(corpus, undisturbed), "--mode=explore", "--config.serve.port=0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments, "--step=best"],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if line.startswith("exploring "))
        found = re.fullmatch(r"exploring .*step \d+ at http://127\.0\.0\.1:(\d+)/\n", line)
        client = Client(int(found[1]))
        next(line for line in lines if "counted over" in line)
        assert client.get("/").body.startswith(b"<!doctype html>")
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"prompt": "document 3\nabcd"}).encode()
        answer = client.send("POST", "/explore", body, headers)
        chosen = answer.json["chosen"]
        rows = [h["reads"] for o in chosen["layers"][0]["orders"] for h in o["heads"]]
        assert answer.status == 200 and len(rows) == 4 and all(np.isfinite(rows))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.endswith("SIGTERM: ends\n")
        assert "ERROR" not in err and "Traceback" not in err
    finally:
        process.kill()
        process.communicate()
