"""A run's memory off the device: files made by launch.py, and the same text from all of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from engram_jax.memory.store.file import open_memory
from engram_jax.memory.store.frequency import load_frequency, save_frequency
from engram_jax.restore import load
from tests.runs import launched, refused, small_config, small_run

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


def generated(corpus, workdir, **serve):
    arguments = small_run(corpus, workdir, generate__max_tokens=24, generate__temperature=0.9)
    arguments += [f"--config.serve.{key}={value}" for key, value in serve.items()]
    return launched(*arguments, "--mode=generate", "--step=best", f"--prompt={PROMPT}")


def test_the_file_holds_the_checkpoints_rows(corpus, undisturbed, made):
    config = small_config(corpus)
    trained = load(config, undisturbed, "best")
    file = open_memory(made[0], trained.program.addressing.fingerprint)
    rows = np.asarray(trained.weights.rows["1"])
    assert set(file.layers) == {"1"} and file.layers["1"][0] == len(rows)
    (stored,) = file.host("1").parts
    np.testing.assert_array_equal(stored.view(np.float32), rows)
    assert (file.metadata["name"], file.metadata["step"]) == (config.name, str(trained.step))
    on_host = load(config, undisturbed, "best", rows="host")
    assert isinstance(on_host.weights.rows["1"], np.ndarray)
    np.testing.assert_array_equal(on_host.weights.rows["1"], rows)
    assert load(config, undisturbed, "best", rows=None).weights.rows == {}


def test_counts_are_those_of_the_training_text(corpus, made):
    from engram_jax.address.pipeline import BatchAddresser
    from engram_jax.run_data import open_together

    data = open_together(small_config(corpus), log=lambda line: None)
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
def test_generation_is_the_same_wherever_the_memory_lies(corpus, undisturbed, made, serve):
    files = {"FILE": made[0], "COUNTS": made[1]}
    given = {key: files.get(value, value) for key, value in serve.items()}
    wanted = generated(corpus, undisturbed)
    assert wanted.code == 0 and len(wanted.out) > len(PROMPT) + 10
    assert generated(corpus, undisturbed, **given) == wanted


def test_without_memory_the_text_is_another(corpus, undisturbed):
    off = generated(corpus, undisturbed, off_layers="(-1,)")
    assert off.code == 0 and off.out != generated(corpus, undisturbed).out


def test_files_of_others_are_refused(corpus, undisturbed, made, tmp_path):
    refused(
        generated(corpus, undisturbed, memory="disk", memory_file=tmp_path / "none"),
        "none",
        "cannot be read",
    )
    (tmp_path / "text").write_text("no table")
    refused(generated(corpus, undisturbed, memory="host", memory_file=tmp_path / "text"), "text")
    other = [*small_run(corpus, undisturbed), "--config.model.engram.seed=9"]
    other += ["--config.serve.memory=disk", f"--config.serve.memory_file={made[0]}"]
    refused(launched(*other, "--mode=generate", "--prompt=a"), "addressing")
    foreign = {"memory": "host", "memory_file": made[0], "device_cache": 0.5}
    refused(
        generated(corpus, undisturbed, **foreign, frequency_file=made[0]),
        "no usable frequency file",
    )


def test_counts_of_another_layer_are_refused(corpus, undisturbed, made, tmp_path):
    counts = load_frequency(made[1])
    path = tmp_path / "counts.npz"
    save_frequency(path, {"7": counts.layers["1"]}, counts.fingerprint, counts.tokens)
    given = {"memory": "host", "device_cache": 0.5, "frequency_file": path}
    refused(generated(corpus, undisturbed, **given), "no Engram layer 1; it has 7")


def test_what_cannot_be_exported(corpus, undisturbed, tmp_path):
    arguments = small_run(corpus, undisturbed)
    fp8 = [f"--output={tmp_path / 'x'}", "--mode=export-memory", "--format=fp8"]
    refused(launched(*arguments, *fp8), "fp8, dim 4", "a multiple of 32")
    nowhere = ["--mode=export-memory", f"--output={tmp_path / 'no' / 'x'}"]
    refused(launched(*arguments, *nowhere), "x: cannot be written")
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
        parse: load(small_config(corpus, serve__parse_special=parse), undisturbed, rows=None)
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
