"""Validates the keys of a schedule, of what a run starts from and trains, and of its loggers."""

from __future__ import annotations

from engram_jax.config.errors import one_of, require
from engram_jax.config.named_paths import NAMED, evaluated_path
from engram_jax.config.path_patterns import EXCEPT
from engram_jax.config.schema import (
    Config,
)
from engram_jax.config.training_schema import (
    CONSTANT,
    COSINE,
    LINEAR,
    MLFLOW,
    STEP,
    TENSORBOARD,
    WANDB,
    WSD,
    OptimizerConfig,
    TrainConfig,
)

SCHEDULES = (STEP, COSINE, LINEAR, WSD, CONSTANT)
SHAPES = (LINEAR, COSINE, "sqrt")
LOGGERS = (TENSORBOARD, WANDB, MLFLOW)
# Key of a schedule -> the schedules that read it.
_READ_BY = {
    "decay_at": (STEP,),
    "decay_at_steps": (STEP,),
    "decay_factors": (STEP,),
    "decay_steps": (COSINE, LINEAR, WSD),
    "decay_share": (COSINE, LINEAR, WSD),
    "decay_shape": (WSD,),
    "min_rate": (COSINE, LINEAR, WSD),
}


def validate_training(config: Config) -> None:
    """Raises UserError for the first rule that is broken."""
    _schedule(config.optimizer, config.train.steps)
    _train(config.train)
    averaged = config.train.ema_decay > 0 or not config.serve.ema
    require(averaged, "serve.ema", True, "false for a run without an average (train.ema_decay = 0)")


def _schedule(optimizer: OptimizerConfig, steps: int) -> None:
    key, name = "optimizer", optimizer.schedule
    require(name in SCHEDULES, f"{key}.schedule", name, one_of(SCHEDULES))
    shape = optimizer.decay_shape
    require(shape in SHAPES, f"{key}.decay_shape", shape, one_of(SHAPES))
    for field, readers in _READ_BY.items():
        value = getattr(optimizer, field)
        used = name in readers or value == getattr(OptimizerConfig(), field)
        require(used, f"{key}.{field}", value, f"left out with optimizer.schedule = {name!r}")
    if name == STEP:
        _step(optimizer)
        return
    if name == CONSTANT:
        return
    share, length, warm = optimizer.decay_share, optimizer.decay_steps, optimizer.warmup_steps
    require(share <= 1, f"{key}.decay_share", share, "a share of train.steps, in [0, 1]")
    both = not share or not length
    require(both, f"{key}.decay_share", share, "left out where optimizer.decay_steps is set")
    require(optimizer.min_rate <= 1, f"{key}.min_rate", optimizer.min_rate, "in [0, 1]")
    room = f"fewer than train.steps = {steps}: optimizer.schedule = {name!r} decays after it"
    require(warm < steps, f"{key}.warmup_steps", warm, room)
    if name == WSD:
        require(
            bool(share or length), f"{key}.decay_share", share, "set, or decay_steps, for 'wsd'"
        )
    left = steps - warm
    if length:
        allowed = f"at most {left}, what optimizer.warmup_steps leaves of train.steps = {steps}"
        require(length <= left, f"{key}.decay_steps", length, allowed)
    if share:
        found = round(share * steps)
        allowed = (
            f"a share of 1 to {left} of train.steps = {steps} (optimizer.warmup_steps = {warm})"
        )
        require(0 < found <= left, f"{key}.decay_share", share, allowed)


def _step(optimizer: OptimizerConfig) -> None:
    key, at = "optimizer.decay_at_steps", optimizer.decay_at_steps
    if not at:
        return
    rising = min(at) >= 0 and list(at) == sorted(set(at))
    require(rising, key, at, "ascending numbers of steps, from 0 up")
    other = optimizer.decay_at
    default = other == OptimizerConfig().decay_at
    require(default, "optimizer.decay_at", other, "left out where optimizer.decay_at_steps is set")
    factors = optimizer.decay_factors
    one_each = f"factors of 0 or more, one for each of {key} = {at}"
    require(len(factors) == len(at), "optimizer.decay_factors", factors, one_each)


def _train(train: TrainConfig) -> None:
    decay = train.ema_decay
    require(decay < 1, "train.ema_decay", decay, "in [0, 1) (0 = no average)")
    kept = bool(train.init_from) or not train.init_optimizer
    require(kept, "train.init_optimizer", True, "false unless train.init_from names a run")
    stripped = train.init_from == train.init_from.strip()
    require(stripped, "train.init_from", train.init_from, "WORKDIR or WORKDIR@STEP, without spaces")
    for pattern in train.trainable:
        some = bool(pattern.removeprefix(EXCEPT).strip("/"))
        allowed = "patterns of paths, such as 'engrams', 'memory/1' or '!*/gain'"
        require(some, "train.trainable", pattern, allowed)
    twice = len(set(train.trainable)) == len(train.trainable)
    require(twice, "train.trainable", train.trainable, "different patterns")
    found = []
    for text in train.evaluations:
        named = evaluated_path(text)
        allowed = f"{NAMED}; with @STEPS (1 or more) behind it for a cadence of its own"
        require(named is not None, "train.evaluations", text, allowed)
        found.append(named.name if named else "")
    different = "texts of different names"
    require(len(set(found)) == len(found), "train.evaluations", train.evaluations, different)
    for name in train.loggers:
        require(name in LOGGERS, "train.loggers", name, one_of(LOGGERS))
    once = len(set(train.loggers)) == len(train.loggers)
    require(once, "train.loggers", train.loggers, "different ones of " + ", ".join(LOGGERS))
