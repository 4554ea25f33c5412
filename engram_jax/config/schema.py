"""The configuration's keys and defaults, as frozen dataclasses.

A file under `configs/` returns an `ml_collections.ConfigDict` with the sections below (a section is
a dataclass, a key is its field, the defaults are the fields' own); `parse_config` turns it into a
`Config`, and nothing else in the project reads the ConfigDict. config/validate.py has the allowed
values.

Symbols used in docstrings and shape comments throughout the project:

    B  batch (sequences)            T  sequence length (tokens)      V  vocabulary
    d  hidden width (`d_model`)     M  residual streams (mHC; the paper's branches)
    N  longest n-gram order         H  hash heads per token and layer = orders x heads per order
    d_mem  width of the concatenated rows e_t                        dim  row width = d_mem / H
    E  routed experts               k  experts per token (`top_k`)   f  expert inner width
    R  rows of one layer's table (the sum of its H head sizes)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engram_jax.config.memory_schema import EngramConfig, ProductKeyConfig
from engram_jax.config.serving_schema import ServeConfig
from engram_jax.config.training_schema import OptimizerConfig, TrainConfig

TASKS = (
    *("facts", "needle", "multi_query", "tracking", "copying", "arithmetic"),
    *("ruler_needle", "ruler_tracking"),
)
DIFFICULTIES = ("easy", "medium", "hard")
LOCAL_BPE = "local-bpe"
OUTPUTS, ATTENTION, QUERIES, EXPERTS = "outputs", "attention", "queries", "experts"
KEPT = (OUTPUTS, ATTENTION, QUERIES, EXPERTS)  # model.kept


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer.

    name: LOCAL_BPE, or that of a published tokenizer, whose file the user must supply to train
      (describe and compile need none).
    path: a `tokenizer.json`; "" = a byte-level BPE trained on the data (see `data`).
    vocab_size: ids of the embedding table (at least the tokenizer's own size).
    canonical_vocab_size: ids after compression; 0 = as many as the tokenizer compresses to. With a
      recorded size, training rejects a tokenizer that compresses differently.
    pad_id: the raw pad id; its canonical id fills the history before a document's start.
    eos_id: the raw id that ends a document; -1 = the data pipeline finds it by its usual names.
      Hash dialect "qwen" needs the number: its history restarts after that id.
    """

    name: str = LOCAL_BPE
    path: str = ""
    vocab_size: int = 4096
    canonical_vocab_size: int = 0
    pad_id: int = 0
    eos_id: int = -1


@dataclass(frozen=True)
class YarnConfig:
    """Rotary embedding for contexts longer than the trained ones (YaRN, arXiv 2309.00071).

    scale: s, how many times as long; 1 = plain rotary embedding.
    original_length: tokens of the context that the model was trained with before.
    alpha: pairs that turn at most so often in `original_length` have their frequency divided by s.
    beta: pairs that turn at least so often keep theirs.
    mscale: f; attention scores are multiplied with (0.1 f ln s + 1)^2.
    """

    scale: float = 1.0
    original_length: int = 4096
    alpha: float = 1.0
    beta: float = 32.0
    mscale: float = 0.707


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention without query compression (DeepSeek-V2/V3).

    heads: attention heads.
    kv_lora_rank: width of the latent that keys and values are computed from, and that is cached.
    nope_dim: width of the part of a head's key without position.
    rope_dim: width of the part with rotary embedding, shared by all heads.
    v_dim: width of a head's value.
    rope_theta: base of the rotary frequencies.
    """

    heads: int = 4
    kv_lora_rank: int = 64
    nope_dim: int = 32
    rope_dim: int = 16
    v_dim: int = 32
    rope_theta: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)


@dataclass(frozen=True)
class FeedForwardConfig:
    """DeepSeekMoE; `routed_experts = 0` makes every layer dense.

    dense_dim: inner width of the dense SwiGLU layers (the first `dense_layers`, or all).
    dense_layers: number of first layers that are dense; the others have experts.
    routed_experts: E, experts of a layer among which the router chooses.
    shared_experts: experts that every token uses, computed as one that is as many times as wide.
    top_k: k, routed experts of a token.
    expert_dim: inner width of one expert; the shared expert is `shared_experts` times as wide.
    routed_scaling: factor of the routed experts' sum.
    normalise_top_k: whether the weights of a token's chosen experts are scaled to the sum 1.
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

    streams: M, residual streams.
    sinkhorn_iterations: of the projection of the residual mixing matrix.
    eps: of mHC's RMSNorm and its normalisations.
    start: "identity" (an almost plain residual network at step 0) or "uniform" (all biases zero).
    transpose: mix the streams with the transpose of the Sinkhorn matrix (DeepSeek-V4), or with the
      matrix itself.
    norm_gain: whether the RMSNorm over all streams has a gain (mHC paper) or not (DeepSeek-V4).
    scale_init: the scale of the coefficients' dynamic part at step 0.
    """

    streams: int = 4
    sinkhorn_iterations: int = 20
    eps: float = 1e-6
    start: str = "identity"
    transpose: bool = False
    norm_gain: bool = True
    scale_init: float = 0.01


@dataclass(frozen=True)
class ModelConfig:
    """The network's size and arithmetic.

    d_model: d, the hidden width.
    layers: transformer layers.
    norm_eps: of every RMSNorm, except where an Engram form or mHC has its own.
    tie_embeddings: whether the output head is the embedding table.
    init_std: standard deviation of the weights at step 0.
    dtype: of the network's computations.
    param_dtype: of the stored parameters and their updates.
    remat: what the backward pass computes again: "none", "dots" (all but matrix products), "block"
      (all but the blocks' inputs and what `kept` names).
    kept: what remat = "block" keeps of every layer, of T tokens: "outputs" of attention and
      feed-forward, 2 T d numbers; "attention", the heads' results, T heads v_dim; "queries",
      T heads (nope_dim + rope_dim); "experts", both products of every routed expert before the
      last, 2 T top_k expert_dim.
    kernels: "auto" runs Pallas kernels where they are supported and faster
      (kernels_pallas/dispatch.py), "reference" plain jax.numpy, "pallas" the kernels or an error
      (interpreted on a CPU: slow; on a GPU training works, but decoding raises the error, since its
      kernel takes no history).
    """

    d_model: int = 128
    layers: int = 6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    kept: tuple[str, ...] = ()
    kernels: str = "auto"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    hyper: HyperConnectionConfig = field(default_factory=HyperConnectionConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    product_keys: ProductKeyConfig = field(default_factory=ProductKeyConfig)


@dataclass(frozen=True)
class TasksConfig:
    """Synthetic tasks mixed into the training text (engram_jax/tasks/); `names = ()` means none.

    The held-out text and a tokenizer that is trained here stay those of the text alone.

    names: which: "facts", "needle", "multi_query", "tracking", "copying", "arithmetic",
      "ruler_needle", "ruler_tracking".
    difficulties: of each: "easy", "medium", "hard".
    share: of the bytes of the training text, tasks included; an equal part for each.
    frequencies: how often an epoch states a fact; an equal number of facts for each.
    test_items: the most test items of a task, difficulty and frequency.
    seed: of documents and items.
    """

    names: tuple[str, ...] = ()
    difficulties: tuple[str, ...] = ("easy",)
    share: float = 0.2
    frequencies: tuple[int, ...] = (1, 4, 16, 64)
    test_items: int = 100
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it is batched.

    source: "local" = the default (the source files of Python's standard library), "folder" =
      files of text or of JSON records under `path`, "tfds" = the TFDS data set named `path`.
    path: the folder or file, or the name or folder of the TFDS data set.
    text_key: the field of a JSON record, or the feature of a data set, that holds the text.
    cache_dir: prepared data sets, trained tokenizers and token stores; "" = $ENGRAM_CACHE, else
      ~/.cache/engram_jax.
    max_megabytes: the most text to use (10^6 bytes); 0 = all. Skipped text is counted in the
      report.
    validation_fraction: share of the documents that is held out, chosen by their content; of one
      that is a large part of the text, a part.
    seq_len: T, tokens of a sequence.
    batch_size: B, sequences of a step.
    seed: of the order of the data.
    max_document_bytes: longer documents are split at line ends.
    near_duplicates: a training document of at least this Jaccard similarity (of word 5-grams) to a
      held-out one is left out; 0 = not looked for; needs the extra `lab`.
    workers: processes that make the batches; 0 = threads of this one.
    keep_long: a training document longer than `seq_len` is cut from its beginning into whole
      sequences; what remains is packed with the short ones. False = cut wherever a sequence ends.
    long_share: share of the training sequences that are such whole ones, the same again if need
      be, to about 1 %; 0 = as many as there are.
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
    near_duplicates: float = 0.0
    workers: int = 0
    keep_long: bool = False
    long_share: float = 0.0
    tasks: TasksConfig = field(default_factory=TasksConfig)


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis of the mesh (sharding/rules.py).

    The tables are sharded by rows over all axes, the batch over `data`, `fsdp` and `expert`.

    data: replicas of the parameters (across slices).
    fsdp: shards of every weight; 0 = all devices that the other axes leave.
    expert: shards of the routed experts, by whole experts.
    sequence: shards of the tokens of each sequence, for contexts that are long; attention gathers
      the latent keys of the whole sequence.
    tensor: shards of attention heads and of inner widths, for the same tokens.
    distinct: share of a device's lookups that address different rows, for which the exchange of
      rows is planned; 0 = measured on the run's first batch (training) or 0.75 (compiling). More
      distinct rows take further rounds; none is dropped.
    headroom: capacity of the exchange as a multiple of that plan.
    """

    data: int = 1
    fsdp: int = 0
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    distinct: float = 0.0
    headroom: float = 1.1


@dataclass(frozen=True)
class GenerateConfig:
    """How --mode=generate and the samples at the end of a run draw tokens.

    max_tokens: longest continuation.
    temperature: 0 = greedy.
    top_p: draw from the smallest set of likeliest tokens that has this probability; 1 = all.
    top_k: draw from the `top_k` likeliest tokens; 0 = all.
    seed: of the draws.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A model and its run.

    name: names the run's folder, and the model when it is served.
    """

    name: str = "unnamed"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
