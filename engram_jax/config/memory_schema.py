"""The keys of the memories: `model.engram` and `model.product_keys`. As config/schema.py."""

from __future__ import annotations

from dataclasses import dataclass

PAPER, V41, QWEN = "paper", "v41", "qwen"
OVER_ENCODING, SCONE = "over_encoding", "scone"
CONTEXT, ONE, LEARNED = "context", "one", "learned"  # gates
HASHED, ONE_ROW, SHUFFLED = "hashed", "one_row", "shuffled"  # lookups
MODEL, BF16, FP8 = "model", "bf16", "fp8"

# An address is an int32, and the 32-bit hash (addressing/hash_jax.py) needs 4 * head size <= 2**32.
# The highest addresses below 2**31 are sentinels: memory/row_gradients.py fills its unused entries
# with them, at most as many as a step looks up in a table.
MAX_LOOKUPS = 2**28
MAX_TABLE_ROWS = 2**31 - MAX_LOOKUPS
MAX_HEAD_SIZE = 2**30
SIGNS_PER_ORDER = 32  # model.engram.signs: the bits of one word (addressing/hash_numpy.py)


@dataclass(frozen=True)
class EngramConfig:
    """The conditional memory. `layers = ()` means none.

    layers: 0-based layer ids, ascending (the paper's prose counts from 1: its 2 and 15 are 1, 14).
    orders: lengths of the n-grams that are looked up.
    heads_per_order: rows read per token, layer and order, each by a separate hash.
    rows_per_head: base size of the heads of each order: one number, or one per order. A head's size
      is the next free prime.
    d_mem: width of the concatenated rows; a row has d_mem / (orders x heads_per_order) numbers.
    seed: of the hash's multipliers.
    form: "paper" (biases, short conv), "v41" (neither), "qwen" (no biases, conv, gains stored
      minus 1); "over_encoding": no gate and no conv, the n-grams' embeddings are averaged into the
      input embedding (layers/over_encoding.py); "scone": no Engram module but, at layers (0,), the
      embeddings of the most frequent n-grams of the training text, rows_per_head of them of all
      orders together (layers/fgram_embedding.py); a token reads one row, so heads_per_order is 1.
    hash_dialect: "paper" (the demo's and V4.1's) or "qwen" (splitmix64, raw ids).
    gate: "context" (equation 4), "one" (no gate: the value is added as it is) or "learned" (one
      constant for each branch); the last two have no keys.
    multi_branch: a key, a gate and a convolution for each residual stream; False = one of each,
      whose query is the mean of the streams and whose output is added to all of them.
    conv_kernel: taps of the short convolution; its dilation is the longest n-gram order. 0 = no
      convolution.
    lookup: "hashed"; "one_row" reduces every head to one row (`rows_per_head` then decides
      nothing); "shuffled" reads the rows of another sequence of the batch: a control, which can be
      trained and evaluated only.
    signs: n-grams that share a row read it with a sign of their own, from their hash (a count
      sketch).
    compression: hash canonical ids; False = raw ids. (Dialect "qwen" always hashes raw ids.)
    case: add a learned vector for what compression removed from the token: leading space and case.
    init_std: standard deviation of the rows at step 0.
    table_dtype: of the rows; "bfloat16" is rounded stochastically (training/optim/rowwise_adam.py);
      for TPUs: on a CPU, XLA converts the whole table for every update. Moments are float32.
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
    gate: str = CONTEXT
    multi_branch: bool = True
    conv_kernel: int = 4
    lookup: str = HASHED
    signs: bool = False
    compression: bool = True
    case: bool = False
    init_std: float = 0.02
    table_dtype: str = "float32"
    addresses: str = "device"
    precision: str = MODEL
    fp8_recipe: str = "block"

    @property
    def hashes_raw_ids(self) -> bool:
        """Whether addresses come from raw token ids, not from canonical ones."""
        return self.hash_dialect == QWEN or self.form == SCONE or not self.compression

    @property
    def heads(self) -> int:
        """H: rows read per token and layer."""
        if self.form == SCONE:
            return 1
        return len(self.orders) * self.heads_per_order

    @property
    def dim(self) -> int:
        """Width of one row."""
        return self.d_mem // self.heads

    @property
    def gated(self) -> bool:
        """Whether the form has gates."""
        return self.form not in (OVER_ENCODING, SCONE)

    @property
    def max_ngram(self) -> int:
        return max(self.orders)

    @property
    def base_rows(self) -> tuple[int, ...]:
        """One base size per order."""
        rows = self.rows_per_head
        return rows * len(self.orders) if len(rows) == 1 else rows


@dataclass(frozen=True)
class ProductKeyConfig:
    """Product-key memory (arXiv 1907.05242), addressed by the hidden state; layers/product_keys.py.
    `layers = ()` means none.

    layers: 0-based layer ids, ascending; the module stands before the layer's attention, where an
      Engram module stands, and after it if there are both.
    sub_keys: of each half of a key, which make sub_keys^2 rows.
    key_dim: width of a query and of a key (two sub-keys).
    heads: queries of a token, each with sub-keys of its own; all read the same values.
    top_k: rows that a query reads.
    dim: width of a value.
    expansion: E, implicit value expansion (UltraMem, arXiv 2411.12364): the sub_keys^2 rows
      are E blocks of sub_keys^2 / E stored values, each block with its own linear map; 1 = none.
    """

    layers: tuple[int, ...] = ()
    sub_keys: int = 64
    key_dim: int = 64
    heads: int = 4
    top_k: int = 8
    dim: int = 128
    expansion: int = 1

    @property
    def rows(self) -> int:
        """Stored values of a layer."""
        return self.sub_keys**2 // self.expansion
