"""What a user is told of flags and keys: --help, the nearest one of a wrong one, and what Ctrl-C
leaves of a mode. And what nobody is told: keys of the server.
"""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from engram_jax import cli, program_flags
from engram_jax import config as config_lib
from engram_jax.checkpoint import run_record
from engram_jax.config.difference import flat
from engram_jax.config.errors import UserError
from engram_jax.config.keys import types_of_keys
from engram_jax.config.parse import config_from_dict
from engram_jax.config.serving_schema import HIDDEN
from engram_jax.run.modes import AFTER_INTERRUPT, MODES, MODES_OF_FLAGS
from tests.runs import TINY, configuration, launched, refused

NEAREST = [
    ("--confg=3", "--confg: unknown flag; did you mean --config?"),
    ("--port=3", "--port: unknown flag; did you mean --config.serve.port?"),
    ("--worker_dir=x", "--worker_dir: unknown flag; did you mean --workdir?"),
    ("--work-dir=x", "--work-dir: unknown flag; did you mean --workdir?"),
    ("--steps=3", "--steps: unknown flag; did you mean --config.train.steps?"),
    ("--seq-len=3", "--seq-len: unknown flag; did you mean --config.data.seq_len?"),
    ("--train.steps=3", "--train.steps: unknown flag; did you mean --config.train.steps?"),
    ("--api-key=x", "--api-key: unknown flag; did you mean --config.serve.api_key?"),
    ("--max_tokens=3", "--max_tokens: unknown flag; did you mean --config.generate.max_tokens?"),
    (
        "--seed=3",
        "did you mean --config.data.seed, --config.train.seed or --config.generate.seed?",
    ),
    ("--promt=x", "--promt: unknown flag; did you mean --prompt?"),
    ("--zzz=1", "--zzz: unknown flag; allowed: --config.KEY, --accept_changes, --against"),
    ("--" + "a" * 5000, "aaa...: unknown flag; allowed: --config.KEY"),
    ("--config.trian.steps=3", "unknown key 'trian'; did you mean --config.train.steps?"),
    ("--config.train.stepps=3", "unknown key 'stepps'; did you mean --config.train.steps?"),
    ("--config.model.batch_size=3", "did you mean --config.data.batch_size?"),
    ("--config.serve.cors=x", "did you mean --config.serve.cors_origins?"),
    ("--config.sevre.prot=3", "unknown key 'sevre'; did you mean --config.serve.port?"),
    ("--config.steps=3", "unknown key 'steps'; did you mean --config.train.steps?"),
    ("--noconfig.train.coun_models", "did you mean --config.train.count_models?"),
    ("--config.model.zzz=3", "config.model.zzz: unknown key 'zzz'; config.model has d_model"),
    ("--config.train['steps']=3", "did you mean --config.train.steps?"),
    ("--flagfile=/none/such", "--flagfile: Unable to open flagfile: [Errno 2] No such file"),
]


@pytest.mark.parametrize(("flag", "words"), NEAREST)
def test_the_nearest_is_told(flag, words):
    line = refused(launched(TINY, flag), words)
    assert line.isprintable() or line[:-1].isprintable()
    assert len(line) < 1500


def test_the_nearest_key_of_a_file():
    values = config_lib.to_dict(config_lib.Config())
    values["train"]["stepps"] = 3
    with pytest.raises(UserError, match=r"config\.train\.stepps: .*mean config\.train\.steps\?$"):
        config_from_dict(values)


def test_flag_files_are_read_like_the_command_line(tmp_path):
    """They are checked likewise, and may hold lists."""
    file = tmp_path / "flags"
    file.write_text("--config.train.stps=3\n")
    refused(launched(TINY, f"--flagfile={file}"), "did you mean --config.train.steps?")
    file.write_text("--config.serve.cors_origins=https://a.example,https://b.example/path\n")
    line = refused(launched(TINY, f"--flagfile={file}"), "config.serve.cors_origins = ")
    assert "'https://b.example/path'" in line


def test_the_last_of_two_lists_of_a_flag_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(cli._RUN, "describe", lambda config, *rest: seen.append(config))
    file = tmp_path / "flags"
    file.write_text("--config.train.trainable=a\n--config.train.trainable=b,c\n")
    for before, after, value in (
        ([], [], ("b", "c")),
        (["--config.train.trainable=d"], [], ("b", "c")),
        ([], ["--config.train.trainable=()"], ()),
    ):
        outcome = launched(TINY, *before, f"--flagfile={file}", *after, "--mode=describe")
        assert (outcome.code, outcome.err) == (0, "")
        assert seen[-1].train.trainable == value


LISTS = [
    ("a,b", ("a", "b")),
    ("https://a.example,http://b.example:3000", ("https://a.example", "http://b.example:3000")),
    ("12345", ("12345",)),
    ("1e5,None", ("1e5", "None")),
    ("('a','b,c')", ("a", "b,c")),
    ("['a']", ("a",)),
    ("()", ()),
    ("one", ("one",)),
]


@pytest.mark.parametrize(("text", "value"), LISTS)
@pytest.mark.parametrize("apart", [False, True])
def test_lists_of_texts(text, value, apart, monkeypatch):
    """`config_flags` alone takes a,b for one text, and 12345 for a number."""
    seen = []
    monkeypatch.setitem(cli._RUN, "describe", lambda config, *rest: seen.append(config))
    flag = ["--config.train.trainable", text] if apart else [f"--config.train.trainable={text}"]
    outcome = launched(TINY, *flag, "--mode=describe")
    assert (outcome.code, outcome.err) == (0, "")
    assert seen[0].train.trainable == value


def test_help_lists_flags_modes_and_keys():
    for flag in ("--help", "-h", "--helpshort", "--helpfull"):
        outcome = launched(flag)
        assert (outcome.code, outcome.err) == (0, "")
        for key in types_of_keys():
            assert f"  --config.{key}=" in outcome.out
        for mode in MODES:
            assert re.search(rf"^  {mode}  \w", outcome.out, re.MULTILINE)
        for name in (*MODES_OF_FLAGS, "config", "workdir", "mode", "num_processes"):
            assert re.search(rf"^  --{name}[= ]", outcome.out, re.MULTILINE), name
        assert ("--verbosity" in outcome.out) == (flag == "--helpfull")
    assert (
        "--config.train.steps=" in outcome.out and "the address of the HTTP server" in outcome.out
    )
    serve = outcome.out.split("\n  serve  ")[1].split("\n  export-memory")[0]
    assert "--step" in serve and "--prompt" not in serve


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_says_what_is_kept(mode, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUN, mode, interrupted)
    monkeypatch.setattr(cli, "_join", lambda *arguments: None)
    needs = {
        "generate": ["--prompt=a"],
        "compile": ["--topology=v5p:2x2x1"],
        "export-memory": ["--output=x"],
        "count-memory": ["--output=x"],
        "lm-eval": ["--tasks=a"],
        "long-ppl": ["--texts=a=x"],
        "report": ["--runs=x"],
    }
    monkeypatch.setattr(program_flags, "require", lambda *arguments: None)  # whatever is installed
    config = [] if mode == "report" else [TINY]
    outcome = launched(*config, f"--mode={mode}", *needs.get(mode, []))
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == f"error: interrupted; {AFTER_INTERRUPT[mode]}\n"


# ---- keys of the server --------------------------------------------------------------------------

SECRET = "sk-never-recorded"


def with_key() -> config_lib.Config:
    config = configuration("engram_tiny")
    return dataclasses.replace(config, serve=config_lib.ServeConfig(api_key=(SECRET, "other")))


def test_no_record_has_a_key(tmp_path):
    """What is written of a configuration says that there were keys, and its copy refuses to serve
    without (tests/serve/hostile/test_keys.py)."""
    config = with_key()
    run_record.add_launch(tmp_path, config, {})
    record = (tmp_path / "run.json").read_text()
    for text in (record, repr(config), json.dumps(flat(config)), str(config_lib.to_dict(config))):
        assert SECRET not in text
    (launch,) = json.loads(record)["launches"]
    assert launch["config"]["serve"]["api_key"] == [HIDDEN, HIDDEN]
    again, _ = run_record.config_of_launch(tmp_path, launch)
    assert config_lib.parse_config(config_lib.to_dict(again)).serve.api_key == (HIDDEN, HIDDEN)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "serve"])
def test_no_other_mode_takes_a_key_by_its_command(mode):
    flags = [f"--config.serve.api_key={SECRET}", "--prompt=a"][: 2 if mode == "generate" else 1]
    flags += {
        "compile": ["--topology=v5p:2x2x1"],
        "lm-eval": ["--tasks=a"],
        "long-ppl": ["--texts=a=x"],
        "report": ["--runs=x"],
    }.get(mode, [])
    flags += ["--output=x"] if mode.endswith("-memory") else []
    outcome = launched(TINY, f"--mode={mode}", *flags)
    line = refused(outcome, "--config.serve.api_key: only for --mode=serve")
    assert SECRET not in line


@pytest.mark.parametrize(
    "value", ["", "sk never", "sk-né", "'sk never'", "(3,)", "sk\x7f", "s" * 1025]
)
def test_a_key_that_cannot_be_one_is_not_shown(value):
    line = refused(launched(TINY, "--mode=serve", f"--config.serve.api_key={value}"))
    assert line.startswith("error: config.serve.api_key: must be ")
    assert not value or value not in line


HTTP: list[tuple[str, str, str]] = [
    ("cors_origins", "example.org", "'*', or origins such as"),
    ("cors_origins", "https://example.org/", "without a path"),
    ("cors_origins", "https://a.example,https://b.example/x", "without a path"),
    ("cors_origins", "https://user@example.org", "'*', or origins such as"),
    ("log_level", "debug", "one of 'info', 'warning', 'error'"),
    ("log_level", "", "one of 'info'"),
    ("access_log", "perhaps", "true or false"),
    ("api_key_file", "a\0b", "without a NUL character"),
]


@pytest.mark.parametrize(("key", "value", "words"), HTTP)
def test_settings_of_the_server(key, value, words):
    refused(launched(TINY, "--mode=serve", f"--config.serve.{key}={value}"), words)
