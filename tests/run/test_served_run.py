"""A run's memory off the device: files made by launch.py, and the same text from all of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from engram_jax.checkpoint.integrity import seal
from engram_jax.checkpoint.load_model import load_model
from engram_jax.memory.store.memory_file import open_memory, write_memory
from engram_jax.memory.store.read_counts import load_frequency, save_frequency
from tests.runs import environment, launched, refused, small_config, small_run, without_stages

PROMPT = "document 3\nabcd"


@pytest.fixture(scope="module")
def made(corpus, undisturbed, tmp_path_factory):
    """(memory file, frequency file) of the run's best checkpoint, as launch.py makes them."""
    folder = tmp_path_factory.mktemp("made")
    memory, counts = folder / "memory.safetensors", folder / "counts.npz"
    arguments = small_run(corpus, undisturbed)
    done = launched(*arguments, "--mode=export-memory", "--step=best", f"--output={memory}")
    assert done.code == 0, done.err
    assert re.search(r"memory\.safetensors: \d+ rows of 4 as float32, [\d,]+ bytes", done.out)
    done = launched(*arguments, "--mode=count-memory", f"--output={counts}", "--tokens=2000")
    assert done.code == 0, done.err
    assert "counted over 2," in done.out
    return memory, counts


def generated(corpus, workdir, step="best", **serve):
    arguments = small_run(corpus, workdir, generate__max_tokens=24, generate__temperature=0.9)
    arguments.append("--config.serve.accept_longer=True")  # trained on 16 tokens
    arguments += [f"--config.serve.{key}={value}" for key, value in serve.items()]
    done = launched(*arguments, "--mode=generate", f"--step={step}", f"--prompt={PROMPT}")
    return dataclasses.replace(done, err=without_stages(done.err))


def refused_at_last(outcome, *words):
    """As `refused`, after the warning that the text is longer than was trained on."""
    assert outcome.code == 2 and without_stages(outcome.out) == ""
    *warnings, line = without_stages(outcome.err).splitlines()
    assert line.startswith("error: ") and all(w.startswith("warning: ") for w in warnings)
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def plain(corpus, undisturbed):
    """What the best checkpoint says with its own table on the device."""
    return generated(corpus, undisturbed)


def test_the_file_holds_the_checkpoints_rows(corpus, undisturbed, made):
    config = small_config(corpus)
    trained = load_model(config, undisturbed, "best")
    file = open_memory(made[0], trained.program.addressing.fingerprint)
    rows = np.asarray(trained.weights.rows["1"])
    assert set(file.layers) == {"1"} and file.layers["1"][0] == len(rows)
    (stored,) = file.host("1").parts
    np.testing.assert_array_equal(stored.view(np.float32), rows)
    assert (file.metadata["name"], file.metadata["step"]) == (config.name, str(trained.step))
    assert file.metadata["checkpoint"] == trained.digest
    on_host = load_model(config, undisturbed, "best", rows="host")
    assert isinstance(on_host.weights.rows["1"], np.ndarray)
    np.testing.assert_array_equal(on_host.weights.rows["1"], rows)
    assert load_model(config, undisturbed, "best", rows=None).weights.rows == {}


def test_counts_are_those_of_the_training_text(corpus, made):
    from engram_jax.addressing.hash_batches import BatchAddresser
    from engram_jax.data.run_data import open_on_all_processes

    data = open_on_all_processes(small_config(corpus), log=lambda line: None)
    found = load_frequency(made[1], data.addressing.fingerprint)
    wanted = np.zeros(found.layers["1"].rows, np.int64)
    seen, batches = 0, data.train_iterator()
    while seen < 2000:
        batch = next(batches)
        real = batch["segments"] > 0
        ids = BatchAddresser(data.addressing)(batch["tokens"], batch["segments"])["1"]
        np.add.at(wanted, ids[real].reshape(-1), 1)
        seen += int(real.sum())
    assert found.tokens == seen
    counted = np.zeros_like(wanted)
    counted[found.layers["1"].ids] = found.layers["1"].counts
    np.testing.assert_array_equal(counted, wanted)


@pytest.mark.parametrize(
    "serve",
    [
        {"memory": "host"},
        {"memory": "device", "memory_file": "FILE"},
        {"memory": "host", "memory_file": "FILE", "device_cache": 0.3, "frequency_file": "COUNTS"},
        {"memory": "disk", "memory_file": "FILE", "host_cache": 0.1, "frequency_file": "COUNTS"},
        {
            "memory": "disk",
            "memory_file": "FILE",
            "host_cache": 0.1,
            "device_cache": 0.05,
            "frequency_file": "COUNTS",
        },
    ],
    ids=lambda serve: "-".join(str(v) for v in serve.values()),
)
def test_generation_is_the_same_wherever_the_memory_lies(corpus, undisturbed, made, plain, serve):
    files = {"FILE": made[0], "COUNTS": made[1]}
    given = {key: files.get(value, value) for key, value in serve.items()}
    assert plain.code == 0 and len(plain.out) > len(PROMPT) + 10
    assert generated(corpus, undisturbed, **given) == plain


@pytest.mark.parametrize("memory", ["device", "disk"])
def test_rows_of_another_step_are_refused(corpus, undisturbed, made, memory):
    best = load_model(small_config(corpus), undisturbed, "best", rows=None)
    assert best.step != 21
    other = generated(corpus, undisturbed, "21", memory=memory, memory_file=made[0])
    words = f"step {best.step}, checkpoint {best.digest[:12]}", "step 21, checkpoint "
    refused_at_last(other, str(made[0]), *words, "serve.accept_other_memory=True")


def test_rows_of_another_step_are_served_on_request(corpus, undisturbed, made):
    given = {"memory": "host", "memory_file": made[0], "accept_other_memory": True}
    done = generated(corpus, undisturbed, "21", **given)
    assert done.code == 0 and f"warning: {made[0]}: holds the rows of" in done.err


def test_a_copy_of_the_run_and_a_file_of_before(corpus, undisturbed, made, plain, tmp_path):
    """A file of before cannot be checked, and that is said."""
    copied = shutil.copytree(undisturbed, tmp_path / "copied")
    file, path = open_memory(made[0]), tmp_path / "before"
    (rows,) = file.host("1").parts
    layers = {"1": (file.layers["1"][1], len(rows), [rows.view(np.float32)])}
    about = {key: file.metadata[key] for key in ("name", "step")}
    write_memory(path, layers, file.fingerprint, about)
    done = generated(corpus, copied, memory="host", memory_file=made[0])
    assert done.out == plain.out and str(made[0]) not in done.err
    done = generated(corpus, copied, memory="host", memory_file=path)
    assert done.out == plain.out
    assert f"warning: {path}" in done.err and "was not checked" in done.err


def test_another_format_is_of_the_same_checkpoint(corpus, undisturbed, made, tmp_path):
    arguments = [*small_run(corpus, undisturbed), "--mode=export-memory", "--step=best"]
    done = launched(*arguments, "--format=bfloat16", f"--output={tmp_path / 'bf16'}")
    assert done.code == 0
    mine, other = (open_memory(path).metadata for path in (tmp_path / "bf16", made[0]))
    assert mine["checkpoint"] == other["checkpoint"] and mine["layers"] != other["layers"]


def test_nothing_longer_than_was_trained(corpus, undisturbed, tmp_path):
    """16 tokens: the checkpoint says so, else the run's record, else the configuration."""
    arguments = small_run(corpus, undisturbed, generate__max_tokens=24, data__seq_len=32)
    arguments.append("--accept_changes=data.seq_len")
    done = launched(*arguments, "--mode=generate", f"--prompt={PROMPT}")
    words = "config.generate.max_tokens = 24", "sequences of 16 tokens", "serve.accept_longer"
    refused_at_last(done, *words)
    arguments = small_run(corpus, undisturbed, serve__port=0, serve__capacity=64)
    refused_at_last(launched(*arguments, "--mode=serve"), "serve.capacity = 64", "of 16 tokens")

    workdir = shutil.copytree(undisturbed, tmp_path / "before")
    for meta in (workdir / "checkpoints").glob("*/meta/metadata"):
        content = json.loads(meta.read_text())["content"]
        assert content["metadata"].pop("seq_len") == 16
        meta.write_text(json.dumps(seal(content)))
    config = small_config(corpus, data__seq_len=32)
    launches = json.loads((workdir / "run.json").read_text())["launches"]
    launches.append(copy.deepcopy(launches[0]) | {"resumed_at": 24})  # has made no checkpoint
    launches[-1]["config"]["data"]["seq_len"] = 64
    (workdir / "run.json").write_text(json.dumps({"launches": launches}))
    assert load_model(config, workdir, rows=None, accept=["data.seq_len"]).seq_len == 16
    (workdir / "run.json").unlink()
    assert load_model(config, workdir, rows=None).seq_len == 32


def test_without_memory_the_text_is_another(corpus, undisturbed, plain):
    off = generated(corpus, undisturbed, off_layers="(-1,)")
    assert off.code == 0 and off.out != plain.out


def test_files_of_others_are_refused(corpus, undisturbed, made, tmp_path):
    refused_at_last(
        generated(corpus, undisturbed, memory="disk", memory_file=tmp_path / "none"),
        "none",
        "No such file",
    )
    (tmp_path / "text").write_text("no table")
    refused_at_last(
        generated(corpus, undisturbed, memory="host", memory_file=tmp_path / "text"), "text"
    )
    other = [*small_run(corpus, undisturbed), "--config.model.engram.seed=9"]
    other += ["--config.serve.memory=disk", f"--config.serve.memory_file={made[0]}"]
    other += ["--accept_changes=model.engram.seed"]
    outcome = launched(*other, "--mode=generate", "--prompt=a")
    warning, line = without_stages(outcome.err).splitlines()
    assert outcome.code == 2 and outcome.out == ""
    assert warning == (
        "warning: other settings than the run's: config.model.engram.seed is 0 there and 9 here"
    )
    assert line.startswith("error: ") and "addressing" in line
    foreign = {"memory": "host", "memory_file": made[0], "device_cache": 0.5}
    refused_at_last(
        generated(corpus, undisturbed, **foreign, frequency_file=made[0]),
        "frequency file",
    )


def test_a_damaged_file_does_not_end_a_text_in_silence(corpus, undisturbed, made, tmp_path):
    path = tmp_path / "damaged"
    content = bytearray(made[0].read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start : start + 4096 * 2] = bytes(4096 * 2)  # most of its rows
    path.write_bytes(content)
    done = generated(corpus, undisturbed, memory="disk", memory_file=path)
    assert done.code == 2 and f"error: {path}: layer 1, tensor" in done.err.splitlines()[-1]


def test_counts_of_another_layer_are_refused(corpus, undisturbed, made, tmp_path):
    counts = load_frequency(made[1])
    path = tmp_path / "counts.npz"
    save_frequency(path, {"7": counts.layers["1"]}, counts.fingerprint, counts.tokens)
    given = {"memory": "host", "device_cache": 0.5, "frequency_file": path}
    refused_at_last(generated(corpus, undisturbed, **given), "no Engram layer 1; it has 7")


def test_what_cannot_be_exported(corpus, undisturbed, tmp_path):
    arguments = small_run(corpus, undisturbed)
    fp8 = [f"--output={tmp_path / 'x'}", "--mode=export-memory", "--format=fp8"]
    refused(launched(*arguments, *fp8), "fp8, dim 4", "a multiple of 32")
    nowhere = ["--mode=export-memory", f"--output={tmp_path / 'no' / 'x'}"]
    refused(launched(*arguments, *nowhere), "is no folder; make it first")
    assert list(tmp_path.iterdir()) == []
    without = small_run(corpus, undisturbed, model__engram__layers="()")
    for mode in ("--mode=count-memory", "--mode=export-memory"):
        done = launched(*without, mode, f"--output={tmp_path / 'x'}")
        refused(done, "model.engram.layers = ()")


def test_a_port_in_use_is_told_at_once(corpus, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = small_run(corpus, tmp_path / "no run")
        done = launched(*arguments, "--mode=serve", f"--config.serve.port={port}")
    refused(done, f"port {port}", "is in use")


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(corpus, undisturbed):
    """--prompt, requests and samples take the ids of the loader; so does training."""
    ids = {
        parse: load_model(small_config(corpus, serve__parse_special=parse), undisturbed, rows=None)
        .tokenizer.encode("a<|eos|>b", add_special_tokens=False)
        .ids
        for parse in (False, True)
    }
    plain = Tokenizer.from_file(str(undisturbed / "tokenizer.json"))
    assert ids[True] == [plain.token_to_id("a"), 2, plain.token_to_id("b")]
    assert 2 not in ids[False] and plain.decode(ids[False]) == "a<|eos|>b"


def test_the_workdir_is_a_tokenizers_folder(corpus, undisturbed):
    """What transformers' AutoTokenizer needs to give the same ids as training did."""
    assert json.loads((undisturbed / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|eos|>",
        "bos_token": None,
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16,
    }
    plain = Tokenizer.from_file(str(undisturbed / "tokenizer.json"))
    assert (
        plain.token_to_id("<|eos|>")
        == json.loads((undisturbed / "text.json").read_text())["eos_id"]
    )


# Run in a process of its own, which has imported nothing yet.
ANSWER_ONE = """
import sys
from pathlib import Path
from engram_jax.checkpoint.run_record import get_config
from engram_jax.config import parse_config
from engram_jax.serve.http.server import Server
from engram_jax.serve.open_engine import open_engine
from engram_jax.serve.request import SamplingParams

workdir = Path(sys.argv[1])
engine = open_engine(parse_config(get_config(f"latest:{workdir}")), workdir, "latest")
print(len(list(engine.stream([5, 6], SamplingParams(max_tokens=2, temperature=0)))))
engine.close()
print([name for name in sys.modules if name.startswith("engram_jax.training")])
"""


def test_an_answer_needs_nothing_of_training(undisturbed):
    command = [sys.executable, "-c", ANSWER_ONE, str(undisturbed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    answered, imported = done.stdout.splitlines()
    assert int(answered) >= 1 and imported == "[]"
