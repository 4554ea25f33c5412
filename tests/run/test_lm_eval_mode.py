"""`--mode=lm-eval` as a user starts it, on one process and on two."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from engram_jax.checkpoint.results import LM_EVAL, read_results
from engram_jax.config.errors import UserError
from engram_jax.harness import evaluate
from engram_jax.harness.loading import Asked
from engram_jax.serve.open_engine import open_engine
from engram_jax.serve.request import SamplingParams
from tests.harness import local_tasks as tasks
from tests.moving import free_port
from tests.runs import ROOT, environment, launched, refused, small_config, small_run

TEXT = "document 3\nabcd efgh abij\n"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
DOCUMENTS = [{"text": "document", "end": " 7"}, {"text": "abcd efgh", "end": " abij"}]


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def undisturbed(undisturbed, tmp_path_factory):
    """A copy: results are written into it."""
    workdir = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(undisturbed, workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    tasks.write(made, "rolling", tasks.ROLLING, test=[{"text": TEXT}])
    tasks.write(made, "likelihood", tasks.LIKELIHOOD, test=DOCUMENTS)
    absent = tasks.LIKELIHOOD | {"dataset_path": "nobody/absent"}
    tasks.write(made, "absent", absent)
    return made


def asked(corpus, workdir, folder, *more):
    names = "likelihood,rolling"
    given = ["--mode=lm-eval", f"--tasks={names}", f"--include_path={folder}", *more]
    return [*small_run(corpus, workdir), *given]


@pytest.mark.slow
def test_the_table_of_a_checkpoint(corpus, undisturbed, folder, tmp_path):
    """What the engine says of the text's tokens, window by window of the 16 that it was trained
    on; the same as JSON, and in a file."""
    file = tmp_path / "results.json"
    done = launched(*asked(corpus, undisturbed, folder, "--json", f"--output={file}"))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads(file.read_text()) == found
    assert found["left_out"] == {} and "step 24" in found["checkpoint"]
    (record,) = read_results(undisturbed, 24)
    assert record["kind"] == LM_EVAL and record["result"] == found
    page = launched("--mode=report", f"--runs={undisturbed}", "--json")
    (table,) = [t for t in json.loads(page.out)["tables"] if t["title"] == "Other tasks"]
    told = {row["name"]: row["cells"][0] for row in table["rows"]}
    rolling = found["results"]["rolling"]["bits_per_byte,none"]
    assert told["rolling (bits_per_byte,none)"]["value"] == rolling
    both = found["results"]["likelihood"]
    (cell,) = [told[name] for name in told if name.startswith("likelihood (acc,")]
    assert (cell["value"], cell["stderr"]) == (both["acc,none"], both["acc_stderr,none"])

    config = small_config(corpus)
    engine = open_engine(config, undisturbed, "latest")
    tokens, size = engine.tokenizer.encode(TEXT).ids, config.data.seq_len
    whole, nats = [engine.eos_id, *tokens], 0.0
    for first in range(0, len(tokens), size):
        last = min(first + size, len(tokens))
        begin = max(0, last - size)
        how = SamplingParams(0, logprobs=0, prompt_logprobs=True, next_ids=(whole[last],))
        (told,) = engine.generate([whole[begin:last]], how)
        values = [p.logprob for p in told.prompt_logprobs]
        nats -= sum(values[first - begin :])
    engine.close()
    wanted = nats / len(TEXT.encode()) / math.log(2)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)

    done = launched(*asked(corpus, undisturbed, folder, "--limit=1"))
    assert done.code == 0, done.err
    assert re.search(r"^\|\s*Tasks\s*\|Version\|", done.out) and "|bits_per_byte|" in done.out


@pytest.mark.slow
def test_what_is_left_out_and_refused(corpus, undisturbed, folder):
    alone = [*small_run(corpus, undisturbed), "--mode=lm-eval", f"--include_path={folder}"]
    done = launched(*alone, "--tasks=absent,likelihood")
    assert done.code == 1 and "|likelihood|" in done.out
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: absent")]
    assert "left out: its data set nobody/absent is not here" in line
    done = launched(*alone, "--tasks=absent")
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-1].startswith("error: --tasks: none of the 1 can be run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks=a", "--limit=1.5"], "--limit=1.5: must be a whole number"),
        (["--tasks=a", "--limit=0"], "--limit=0: must be"),
        (["--tasks=a", "--num_fewshot=-1"], "--num_fewshot=-1: must be at least 0"),
        (
            ["--tasks=ruler", "--ruler_lengths=4096,4k"],
            "--ruler_lengths=4096,4k: must be different",
        ),
        (["--tasks=ruler", "--ruler_lengths=64,64"], "--ruler_lengths=64,64: must be different"),
        (["--tasks"], "--tasks: missing"),
        ([], "--tasks: missing"),
        (["--tasks=a,,b"], "--tasks=a,,b: has an empty name"),
    ],
)
def test_flags_that_are_refused(corpus, tmp_path, flags, words):
    refused(launched(*small_run(corpus, tmp_path / "run"), "--mode=lm-eval", *flags), words)


def test_a_workdir_without_a_model_is_told_before_the_tasks_are_read(corpus, tmp_path, folder):
    config, wanted = small_config(corpus), Asked(("rolling",), include=folder)
    with pytest.raises(UserError, match="no trained model"):
        evaluate.evaluate_tasks(config, tmp_path / "run", "latest", wanted)


@pytest.mark.slow
def test_two_processes_are_one(corpus, undisturbed, folder, tmp_path):
    """Process 0 reads the tasks and says the result; the numbers are those of one process."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    arguments = [asked(corpus, undisturbed, folder, f"--output={file}") for file in files]
    assert launched(*arguments[0]).code == 0
    place = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *arguments[1], *place, f"--process_id={i}"],
            env=os.environ | environment() | OFFLINE | {"HF_HOME": str(tmp_path / f"hf{i}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = [process.communicate(timeout=400) for process in started]
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    assert "|bits_per_byte|" in ended[0][0] and "bits_per_byte" not in ended[1][0]
    one, two = (json.loads(file.read_text())["results"] for file in files)
    assert one.keys() == two.keys() == {"likelihood", "rolling"}
    for name in one:
        for metric, value in one[name].items():
            if isinstance(value, float):
                np.testing.assert_allclose(two[name][metric], value, rtol=1e-4)
