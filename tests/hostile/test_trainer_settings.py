"""Settings of the trainer that have no meaning: each is one line that names the key, what was given
and what is allowed, with status 2, before anything is read or written."""

from __future__ import annotations

import pytest

from tests.runs import launched, refused, small_run

# The model (runs.SMALL) trains 24 steps, 2 of them warm-up; memory at layer 1.
CASES = [
    # A schedule that there is not.
    ("optimizer.schedule=cosin", "'cosin'", "'step', 'cosine', 'linear', 'wsd', 'constant'"),
    ("optimizer.schedule=", "''", "'step', 'cosine'"),
    ("optimizer.schedule=Cosine", "'Cosine'", "must be one of"),
    ("optimizer.schedule=1", "'1'", "must be one of"),
    ("optimizer.decay_shape=exponential", "'exponential'", "'linear', 'cosine', 'sqrt'"),
    # Keys that this schedule does not read.
    ("optimizer.min_rate=0.1", "0.1", "left out with optimizer.schedule = 'step'"),
    ("optimizer.decay_share=0.5", "0.5", "left out with optimizer.schedule = 'step'"),
    ("optimizer.decay_steps=5", "5", "left out with optimizer.schedule = 'step'"),
    ("optimizer.decay_shape=sqrt", "'sqrt'", "left out with optimizer.schedule = 'step'"),
    ("optimizer.schedule=cosine optimizer.decay_at=(0.5,0.7)", "(0.5, 0.7)", "left out with"),
    ("optimizer.schedule=linear optimizer.decay_at_steps=(3,)", "(3,)", "schedule = 'linear'"),
    ("optimizer.schedule=wsd optimizer.decay_factors=(0.5,0.1)", "(0.5, 0.1)", "'wsd'"),
    ("optimizer.schedule=cosine optimizer.decay_shape=sqrt", "'sqrt'", "'cosine'"),
    ("optimizer.schedule=constant optimizer.min_rate=0.1", "0.1", "'constant'"),
    ("optimizer.schedule=constant optimizer.decay_steps=4", "4", "'constant'"),
    ("optimizer.schedule=constant optimizer.decay_at=(0.5,0.6)", "(0.5, 0.6)", "'constant'"),
    # Decays that do not fit the run.
    ("optimizer.schedule=cosine optimizer.warmup_steps=24", "24", "fewer than train.steps = 24"),
    ("optimizer.schedule=linear optimizer.warmup_steps=2000", "2000", "decays after it"),
    ("optimizer.schedule=cosine optimizer.decay_steps=23", "23", "at most 22, what optimizer.warm"),
    ("optimizer.schedule=wsd optimizer.decay_steps=25", "25", "at most 22"),
    ("optimizer.schedule=wsd optimizer.decay_share=0.95", "0.95", "a share of 1 to 22"),
    ("optimizer.schedule=wsd optimizer.decay_share=0.001", "0.001", "a share of 1 to 22"),
    ("optimizer.schedule=wsd", "0.0", "set, or decay_steps, for 'wsd'"),
    ("optimizer.schedule=cosine optimizer.decay_share=1.5", "1.5", "in [0, 1]"),
    ("optimizer.schedule=cosine optimizer.decay_share=-0.5", "-0.5", "0 or more"),
    ("optimizer.schedule=cosine optimizer.decay_steps=-1", "-1", "0 or more"),
    (
        "optimizer.schedule=cosine optimizer.decay_steps=4 optimizer.decay_share=0.5",
        "0.5",
        "left out where optimizer.decay_steps is set",
    ),
    ("optimizer.schedule=cosine optimizer.min_rate=1.5", "1.5", "in [0, 1]"),
    ("optimizer.schedule=cosine optimizer.min_rate=-0.1", "-0.1", "0 or more"),
    ("optimizer.schedule=cosine optimizer.min_rate=nan", "nan", "a finite number"),
    ("optimizer.schedule=wsd optimizer.decay_share=inf", "inf", "a finite number"),
    ("optimizer.decay_at_steps=(5,3)", "(5, 3)", "ascending numbers of steps"),
    ("optimizer.decay_at_steps=(3,3)", "(3, 3)", "ascending numbers of steps"),
    ("optimizer.decay_at_steps=(-3,3)", "(-3, 3)", "from 0 up"),
    ("optimizer.decay_at_steps=(3,)", "config.optimizer.decay_factors", "one for each of optimi"),
    ("optimizer.decay_at_steps=(0.5,0.6)", "0.5", "a whole number"),
    (
        "optimizer.decay_at_steps=(3,5) optimizer.decay_at=(0.1,0.2)",
        "config.optimizer.decay_at = (0.1, 0.2)",
        "left out where optimizer.decay_at_steps is set",
    ),
    (
        "optimizer.decay_at_steps=(3,5) optimizer.decay_factors=(0.5,-0.1)",
        "(0.5, -0.1)",
        "factors of 0 or more",
    ),
    # What a run starts from.
    ("train.init_optimizer=true", "True", "false unless train.init_from names a run"),
    ("train.init_from=' '", "' '", "WORKDIR or WORKDIR@STEP"),
    ("train.init_from=/none/run", "'/none/run'", "no such folder; must be the --workdir of a tr"),
    ("train.init_from=/none/run@3", "'/none/run@3'", "no such folder"),
    ("train.init_from=/none/run@-3", "'/none/run@-3'", "after @ must stand latest, best or a st"),
    ("train.init_from=/none/run@", "'/none/run@'", "after @ must stand"),
    ("train.init_from=@latest", "'@latest'", "after @ must stand"),
    ("train.init_from=/none@1.5", "'/none@1.5'", "after @ must stand"),
    ("train.init_from=gs://bucket/run", "'gs://bucket/run'", "no such folder"),
    ("train.init_from=.", "'.'", "no run with a checkpoint there"),
    ("train.init_from=/dev/null", "'/dev/null'", "no such folder"),
    # What is trained.
    ("train.trainable=('',)", "''", "patterns of paths, such as 'engrams'"),
    ("train.trainable=('!',)", "'!'", "patterns of paths"),
    ("train.trainable=('/',)", "'/'", "patterns of paths"),
    ("train.trainable=('engrams','engrams')", "('engrams', 'engrams')", "different patterns"),
    ("train.trainable=(1,)", "1", "text"),
    ("train.trainable=('engram',)", "'engram' matches no parameter", "nearest is 'engrams'"),
    ("train.trainable=('memory/0',)", "'memory/0' matches no", "nearest is 'memory/1'"),
    ("train.trainable=('!*/q_prj',)", "'!*/q_prj' matches no", "nearest is '!*/q_proj'"),
    ("train.trainable=('*','!*')", "('*', '!*')", "chooses nothing; must leave something"),
    (
        "optimizer.memory_optimizer=frozen train.trainable=('memory',)",
        "'memory' matches no parameter and no table that is trained",
    ),
    ("train.trainable=('product_keys',)", "'product_keys' matches no parameter"),
    # Averages, losses, loggers.
    ("train.ema_decay=1", "1.0", "in [0, 1)"),
    ("train.ema_decay=1.5", "1.5", "in [0, 1)"),
    ("train.ema_decay=-0.1", "-0.1", "0 or more"),
    ("train.ema_decay=nan", "nan", "a finite number"),
    ("train.ema_decay=slow", "'slow'", "a number"),
    ("serve.ema=true", "True", "false for a run without an average (train.ema_decay = 0)"),
    ("train.z_loss=-1e-4", "-0.0001", "0 or more"),
    ("train.z_loss=inf", "inf", "a finite number"),
    ("train.log_norms=some", "'some'", "true or false"),
    ("train.log_activations=2", "'2'", "true or false"),
    ("train.loggers=('tensorbord',)", "'tensorbord'", "'tensorboard', 'wandb', 'mlflow'"),
    ("train.loggers=('',)", "''", "'tensorboard', 'wandb', 'mlflow'"),
    ("train.loggers=('wandb','wandb')", "('wandb', 'wandb')", "different ones of"),
    ("train.loggers=(True,)", "True", "text"),
    ("train.evaluations=books", "'books'", "NAME=PATH"),
    ("train.evaluations=a=x@0", "'a=x@0'", "@STEPS (1 or more)"),
    ("train.evaluations==x", "'=x'", "NAME=PATH"),
    ("train.evaluations=('a=x','a=y@3')", "('a=x', 'a=y@3')", "texts of different names"),
    # Keys that are not there.
    ("train.init=/none", "unknown key 'init'", "did you mean --config.train.init_from or"),
    (
        "optimizer.lr_schedule=cosine",
        "unknown key 'lr_schedule'",
        "did you mean --config.optimizer.schedule?",
    ),
    ("train.ema=0.9", "unknown key 'ema'", "did you mean --config.train.ema_decay or"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_setting_without_a_meaning_is_one_line(case, tmp_path):
    settings, *words = case
    workdir = tmp_path / "run"
    given = [f"--config.{each}" for each in settings.replace("' '", "\0").split()]
    given = [each.replace("\0", " ") for each in given]
    line = refused(launched(*small_run(tmp_path / "text", workdir), *given), *words)
    assert line.startswith("error: config.") and not workdir.exists()


KNOWN = [  # Every spelling that is allowed reaches the data, which is not there.
    "optimizer.schedule=cosine optimizer.min_rate=1",
    "optimizer.schedule=linear optimizer.decay_steps=22 optimizer.min_rate=0.1",
    "optimizer.schedule=wsd optimizer.decay_share=0.2 optimizer.decay_shape=sqrt",
    "optimizer.schedule=constant optimizer.warmup_steps=0",
    "optimizer.decay_at_steps=(3,90) optimizer.decay_factors=(0.5,0)",
    "train.trainable=('!*/gain',)",
    "train.loggers=()",
    "train.ema_decay=0.999 serve.ema=true",
    "train.z_loss=1e-4 train.log_norms=true train.log_activations=true",
]


@pytest.mark.parametrize("settings", KNOWN)
def test_what_has_a_meaning_is_not_refused(settings, tmp_path):
    given = [f"--config.{each}" for each in settings.split()]
    line = refused(launched(*small_run(tmp_path / "text", tmp_path / "run"), *given))
    assert "config.data.path" in line and "no such folder" in line
