"""The keys of training: `optimizer` and `train`. As config/schema.py."""

from __future__ import annotations

from dataclasses import dataclass

ROWWISE_ADAM, DENSE_ADAM, FROZEN = "rowwise_adam", "dense_adam", "frozen"
STEP, COSINE, LINEAR, WSD, CONSTANT = "step", "cosine", "linear", "wsd", "constant"  # schedules
TENSORBOARD, WANDB, MLFLOW = "tensorboard", "wandb", "mlflow"


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest, row-wise Adam for the tables (paper, section 4).

    peak_lr: learning rate after the warm-up.
    schedule: how the rate goes on after the warm-up (training/optim/schedule.py): "step" (the
      paper's), "cosine", "linear", "wsd" (stable, then a decay at the end) or "constant".
    warmup_steps: steps of linear warm-up.
    decay_at: of "step": fractions of train.steps at which the rate steps down.
    decay_at_steps: the same as numbers of steps, in place of decay_at; () = decay_at.
    decay_factors: the rate from each of them on, as a factor of peak_lr.
    decay_steps: of "cosine", "linear" and "wsd": the last so many steps of the run are the decay.
    decay_share: the same as a share of train.steps; both 0 = all after the warm-up ("wsd" needs
      one of them).
    decay_shape: of the decay of "wsd": "linear", "cosine" or "sqrt" (1 - square root).
    min_rate: what "cosine", "linear" and "wsd" decay to, as a factor of peak_lr.
    weight_decay: decoupled, of what Muon and AdamW update; none for gains, biases and tables.
    clip_norm: largest global norm of the gradients, rows included; inf = no clipping.
    muon_momentum: momentum (Nesterov) of Muon.
    muon_ns_steps: Newton-Schulz iterations.
    muon_rms: root mean square of Muon's update before the learning rate.
    adam_b1, adam_b2, adam_eps: of AdamW and of row-wise Adam.
    memory_lr_multiplier: the tables' learning rate as a multiple of the others'; product-key
      values', too.
    memory_optimizer: "rowwise_adam" updates the rows that were read; "dense_adam" all rows, for
      comparison; "frozen" none: the tables stay as they were drawn.
    """

    peak_lr: float = 4e-4
    schedule: str = STEP
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_at_steps: tuple[int, ...] = ()
    decay_factors: tuple[float, ...] = (0.316, 0.1)
    decay_steps: int = 0
    decay_share: float = 0.0
    decay_shape: str = LINEAR
    min_rate: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    muon_rms: float = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    memory_lr_multiplier: float = 5.0
    memory_optimizer: str = ROWWISE_ADAM


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run, what it starts from and trains, and when it evaluates, saves and logs.

    steps: optimizer steps.
    init_from: WORKDIR or WORKDIR@STEP (latest, best or a number): start from that run's weights and
      tables, with a schedule, data and optimizer of this run's own; "" = from train.seed. It reads
      text with that run's tokenizer unless tokenizer.path names it elsewhere.
    init_optimizer: with init_from: take that run's moments over, too, parameters' and tables'.
    trainable: patterns of the parameters and tables that are updated, such as engrams, memory/1
      or !*/gain (all but those); () = all. config/path_patterns.py has the rules.
    ema_decay: decay of an exponential moving average of the trained parameters, kept beside them
      (serve.ema uses it); tables have none; 0 = no average.
    z_loss: coefficient of the mean squared logarithm of the softmax's normaliser (PaLM, section 5),
      added to what is differentiated and not to the losses that are reported.
    accumulation: microbatches of a step.
    log_every: steps between lines of metrics.
    log_norms: log the norms of gradients and parameters by part of the model, too.
    log_activations: log root mean square and kurtosis of the residual streams after every layer,
      and of what each memory adds to them, too.
    loggers: where metrics go besides metrics.jsonl: "tensorboard", "wandb", "mlflow" (extras of
      their names); () = nowhere.
    eval_every: steps between evaluations, after each of which a checkpoint is saved.
    eval_batches: `validation_loss` is measured on the first `eval_batches` batches of the held-out
      split, every eval_every steps and at the end; the whole split's loss, `held_out_loss`, at the
      end and by --mode=evaluate.
    evaluations: further texts that are scored while training, NAME=PATH or NAME=PATH@STEPS: a file
      or folder, its first eval_batches batches, every STEPS steps (default eval_every) and at the
      end; metrics evaluations/NAME/nats_per_token and bits_per_byte. They decide no checkpoint.
    checkpoint_every: steps between further checkpoints.
    keep: how many of the latest checkpoints are kept.
    keep_best: how many of those with the lowest validation loss are kept, too.
    seed: of the parameters, the tables and stochastic rounding.
    count_models: fit unigram, bigram and Kneser-Ney models to the same training tokens at the end.
    seen_tokens: the held-out loss is shown by whether the n-gram of context occurs in what the run
      was trained on, if that is at most so many different tokens; 0 = never.
    samples: prompts that are continued at the end.
    sample_tokens: longest continuation of one.
    hang_seconds: report a hang when no step has ended for that long (10 times as long for the first
      step and for evaluation and checkpoints); 0 = never.
    hang_exit: then also end the process, with status 3, so that a supervisor can restart it.
    """

    steps: int = 50_000
    init_from: str = ""
    init_optimizer: bool = False
    trainable: tuple[str, ...] = ()
    ema_decay: float = 0.0
    z_loss: float = 0.0
    accumulation: int = 1
    log_every: int = 10
    log_norms: bool = False
    log_activations: bool = False
    loggers: tuple[str, ...] = (TENSORBOARD,)
    eval_every: int = 500
    eval_batches: int = 16
    evaluations: tuple[str, ...] = ()
    checkpoint_every: int = 500
    keep: int = 3
    keep_best: int = 1
    seed: int = 0
    count_models: bool = False
    seen_tokens: int = 100_000_000
    samples: tuple[str, ...] = ()
    sample_tokens: int = 64
    hang_seconds: float = 600.0
    hang_exit: bool = False
