"""Every dimension and switch of a model and its run, as frozen dataclasses.

A file under `configs/` returns an `ml_collections.ConfigDict` with the sections below (a section is
a dataclass, a key is its field, the defaults are the fields' own); `parse_config` turns it into a
`Config`, and nothing else in the project ever reads the ConfigDict. Which values are possible
stands in config/validate.py.

Symbols used in docstrings and shape comments all over the project:

    B  batch (sequences)            T  sequence length (tokens)      V  vocabulary
    d  hidden width (`d_model`)     M  residual streams (mHC; the paper's branches)
    N  longest n-gram order         H  hash heads per token and layer = orders x heads per order
    d_mem  width of the concatenated rows e_t                        dim  row width = d_mem / H
    E  routed experts               k  experts per token (`top_k`)   f  expert inner width
    R  rows of one layer's table (the sum of its H head sizes)
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAPER, V41, QWEN = "paper", "v41", "qwen"
MODEL, BF16, FP8 = "model", "bf16", "fp8"
DEVICE, HOST, DISK = "device", "host", "disk"
ALL_LAYERS = -1
LOCAL_BPE = "local-bpe"
ROWWISE_ADAM, DENSE_ADAM = "rowwise_adam", "dense_adam"

# An address is an int32, and the 32-bit hash (addressing/hash_jax.py) needs 4 * head size <= 2**32.
# The highest addresses belong to no row: memory/row_gradients.py fills its unused entries, as many
# as a step looks up in a table, with the last ones below 2**31.
MAX_LOOKUPS = 2**28
MAX_TABLE_ROWS = 2**31 - MAX_LOOKUPS
MAX_HEAD_SIZE = 2**30


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer the token ids come from.

    name: LOCAL_BPE, or a published tokenizer's, whose file the user must supply to train (describe
      and compile need none).
    path: a `tokenizer.json`; "" = a byte-level BPE trained on the data (see `data`).
    vocab_size: ids of the embedding table (at least the tokenizer's own size).
    canonical_vocab_size: ids after compression; 0 = whatever the tokenizer compresses to. A
      recorded size makes training refuse a tokenizer that compresses differently.
    pad_id: the raw pad id; its canonical id fills the history before a document's start.
    eos_id: the raw id that ends a document; -1 = the data pipeline finds it by its usual names.
      Hash dialect "qwen" needs the number: its history restarts there.
    """

    name: str = LOCAL_BPE
    path: str = ""
    vocab_size: int = 4096
    canonical_vocab_size: int = 0
    pad_id: int = 0
    eos_id: int = -1


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention without query compression (DeepSeek-V2/V3)."""

    heads: int = 4
    kv_lora_rank: int = 64
    nope_dim: int = 32
    rope_dim: int = 16
    v_dim: int = 32
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class FeedForwardConfig:
    """DeepSeekMoE; `routed_experts = 0` makes every layer dense.

    dense_dim: inner width of the dense SwiGLU layers (the first `dense_layers`, or all).
    expert_dim: inner width of one expert; the shared expert is `shared_experts` times as wide.
    bias_update_rate: step of the auxiliary-loss-free balancing bias (selection only).
    """

    dense_dim: int = 512
    dense_layers: int = 1
    routed_experts: int = 0
    shared_experts: int = 0
    top_k: int = 0
    expert_dim: int = 0
    routed_scaling: float = 1.0
    normalise_top_k: bool = True
    bias_update_rate: float = 0.001


@dataclass(frozen=True)
class HyperConnectionConfig:
    """mHC, manifold-constrained hyper-connections (arXiv 2512.24880); layers/hyper_connections.py.

    start: "identity" (an almost plain residual network at step 0) or "uniform" (all biases zero).
    transpose: mix the streams with the transpose of the Sinkhorn matrix (DeepSeek-V4), or with the
      matrix itself.
    norm_gain: whether the RMSNorm over all streams has a gain (mHC paper) or not (DeepSeek-V4).
    """

    streams: int = 4
    sinkhorn_iterations: int = 20
    eps: float = 1e-6
    start: str = "identity"
    transpose: bool = False
    norm_gain: bool = True
    scale_init: float = 0.01


@dataclass(frozen=True)
class EngramConfig:
    """The conditional memory. `layers = ()` means none.

    layers: 0-based layer ids, ascending (the paper's prose counts from 1: its 2 and 15 are 1, 14).
    rows_per_head: base size of the heads of each order: one number, or one per order.
    form: "paper" (biases, short conv), "v41" (neither), "qwen" (no biases, conv, gains stored
      minus 1).
    hash_dialect: "paper" (the demo's and V4.1's) or "qwen" (splitmix64, raw ids).
    init_std: standard deviation of the rows at step 0.
    table_dtype: of the rows; "bfloat16" is rounded stochastically (optim/rowwise_adam.py); for
      TPUs: on a CPU, XLA converts the whole table for every update. Moments are float32.
    addresses: "device" hashes inside the training step, "host" in the data pipeline; same bits.
    precision: of the projection to keys and value: "model" computes in model.dtype, "bf16", or
      "fp8": e4m3 rows and weights forward, gradients in model.dtype.
    fp8_recipe: the scales of "fp8": "channel", "block" (128 columns; 128 x 128) or "mx" (powers of
      two for 32 columns; 32 x 32); kernels_pallas/engram_gate/quantise.py.
    """

    layers: tuple[int, ...] = ()
    orders: tuple[int, ...] = (2, 3)
    heads_per_order: int = 8
    rows_per_head: tuple[int, ...] = (4000,)
    d_mem: int = 128
    seed: int = 0
    form: str = PAPER
    hash_dialect: str = PAPER
    conv_kernel: int = 4
    init_std: float = 0.02
    table_dtype: str = "float32"
    addresses: str = "device"
    precision: str = MODEL
    fp8_recipe: str = "block"

    @property
    def heads(self) -> int:
        """H: rows read per token and layer."""
        return len(self.orders) * self.heads_per_order

    @property
    def dim(self) -> int:
        """Width of one row."""
        return self.d_mem // self.heads

    @property
    def max_ngram(self) -> int:
        return max(self.orders)

    @property
    def base_rows(self) -> tuple[int, ...]:
        """One base size per order."""
        rows = self.rows_per_head
        return rows * len(self.orders) if len(rows) == 1 else rows


@dataclass(frozen=True)
class ModelConfig:
    """kernels: "auto" runs Pallas kernels where they pay and can (kernels_pallas/dispatch.py),
    "reference" plain jax.numpy, "pallas" the kernels or an error (interpreted on a CPU: slow; on a
    GPU it trains, and decoding is the error: that kernel takes no history).
    """

    d_model: int = 128
    layers: int = 6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    kernels: str = "auto"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    hyper: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from.

    source: "local" = the embedded default (the sources of Python's standard library), "folder" =
      text/JSONL files under `path`, "tfds" = the TFDS data set named `path`.
    cache_dir: prepared data sets, trained tokenizers and token stores; "" = $ENGRAM_CACHE, else
      ~/.cache/engram_jax.
    max_megabytes: at most so much text (10^6 bytes); 0 = all. What is left out is counted in the
      report.
    max_document_bytes: longer documents are cut at line ends.
    workers: processes that make the batches; 0 = threads of this one.
    """

    source: str = "local"
    path: str = ""
    text_key: str = "text"
    cache_dir: str = ""
    max_megabytes: int = 0
    validation_fraction: float = 0.02
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0
    max_document_bytes: int = 1 << 20
    workers: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has (sharding/rules.py says what they cut).

    data: copies of the parameters (across slices). fsdp: pieces of every weight; 0 = all devices
      that the other axes leave. expert: devices that share out the routed experts. tensor: pieces
      of attention heads and of inner widths, for the same tokens. The tables are cut by all of
      them, the batch by all but `tensor`.
    distinct: share of a device's lookups that address different rows, for which the exchange of
      rows is planned; 0 = what the run's first batch has (training) or 0.75 (compiling). More is
      served in further rounds, never dropped.
    headroom: capacity of the exchange in units of that plan.
    """

    data: int = 1
    fsdp: int = 0
    expert: int = 1
    tensor: int = 1
    distinct: float = 0.0
    headroom: float = 1.1


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest, row-wise Adam for the tables (paper, section 4)."""

    peak_lr: float = 4e-4
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_factors: tuple[float, ...] = (0.316, 0.1)
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
    """eval_batches: the first so many batches of the held-out split are what `validation_loss` is
      measured on, every eval_every steps and at the end; the whole split's loss, `held_out_loss`,
      is measured at the end and by --mode=evaluate.
    count_models: fit unigram, bigram and Kneser-Ney models to the same training tokens at the end.
    hang_seconds: report a hang when no step has ended for so long (10 times that for the first
      step and for evaluation and checkpoints); 0 = never.
    hang_exit: then also end the process, with status 3, so that a supervisor can start it again.
    """

    steps: int = 50_000
    accumulation: int = 1
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int = 16
    checkpoint_every: int = 500
    keep: int = 3
    keep_best: int = 1
    seed: int = 0
    count_models: bool = False
    samples: tuple[str, ...] = ()
    sample_tokens: int = 64
    hang_seconds: float = 600.0
    hang_exit: bool = False


@dataclass(frozen=True)
class GenerateConfig:
    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class ServeConfig:
    """Inference: what the engine keeps, and where the memory lies.

    sequences: decoded together. capacity: most tokens of one, prompt and answer; 0 = as many as
      the checkpoint was last trained on (data.seq_len). accept_longer: more, with a warning; for
      --mode=generate, too.
    page: tokens of a page of the key-value cache. pages: of all sequences together; 0 = room for
      `sequences` of full length, fewer = long ones wait, or are moved to host memory and back.
    prefill_chunk: tokens of a prompt that are computed at a time, of `prefill_sequences` at once.
    queue: requests that may wait.
    memory: where the tables lie: "device", "host" (DRAM) or "disk" (in the file).
    memory_file: what --mode=export-memory wrote; "" = the checkpoint's own tables.
    accept_other_memory: a memory_file of another checkpoint, with a warning.
    frequency_file: what --mode=count-memory wrote: which rows are read most.
    device_cache, host_cache: share of the rows, the most frequent ones, kept on the device, and
      kept in DRAM in front of a disk.
    off_layers, off_orders: Engram layers that add nothing and n-gram orders whose rows read as
      zero, for analysis; off_layers (-1,) = all.
    parse_special: whether special tokens that are spelled in a prompt become their ids; otherwise
      they are text, as in training.
    host, port: where HTTP is served; port 0 = any free one.
    max_body: bytes of a request. drain_seconds: for running requests, after SIGTERM.
    """

    sequences: int = 8
    capacity: int = 0
    accept_longer: bool = False
    page: int = 64
    pages: int = 0
    prefill_chunk: int = 128
    prefill_sequences: int = 2
    queue: int = 256
    memory: str = DEVICE
    memory_file: str = ""
    accept_other_memory: bool = False
    frequency_file: str = ""
    device_cache: float = 0.0
    host_cache: float = 0.0
    off_layers: tuple[int, ...] = ()
    off_orders: tuple[int, ...] = ()
    parse_special: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    max_body: int = 1 << 20
    drain_seconds: float = 30.0

    def is_off(self, layer: str | int) -> bool:
        """Whether an Engram layer adds nothing."""
        return any(off in (ALL_LAYERS, int(layer)) for off in self.off_layers)


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
