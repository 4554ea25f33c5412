"""Chooses the primes and multipliers of every layer's hash, from the configuration alone.

There are two dialects. "paper" is the public demo's and DeepSeek-V4.1's (the same code with other
sizes); "qwen" is the Qwen PLE layer's (Hugging Face transformers, model type qwen4_exp). They
differ in the multipliers' generator, in how primes are assigned, in the history's restart and in
the padding of the table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from engram_jax.config import MAX_HEAD_SIZE, MAX_TABLE_ROWS, ONE_ROW, QWEN, EngramConfig
from engram_jax.config.errors import UserError

_INT64_MAX = 2**63 - 1
_MASK64 = 2**64 - 1
_LAYER_STEP = 10007  # both dialects: the seed of a layer is seed + 10007 * layer
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment
_QWEN_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class LayerAddressing:
    """Everything that decides one layer's addresses, given canonical ids. Hashable: static in jit.

    layer_id: 0-based.
    multipliers: m_0 .. m_{N-1}, odd, in [1, 2**63): m_k multiplies the id k positions back.
    head_sizes: H primes, order-major: all heads of the first order, then of the next; all 1 where
      config.model.engram.lookup is "one_row".
    orders: n-gram orders, ascending; N is the last.
    heads_per_order: heads of each order.
    fill_id: canonical id read before a document's start (pad; Qwen: end of sequence).
    restart_id: canonical id after which the history restarts although the document goes on (Qwen:
      end of sequence), None = none.
    row_multiple: the table's row count is rounded up to a multiple of this.

    Raises UserError when a head or the table has more rows than an int32 address can reach, and
    ValueError where the fields do not fit each other.
    """

    layer_id: int
    multipliers: tuple[int, ...]
    head_sizes: tuple[int, ...]
    orders: tuple[int, ...]
    heads_per_order: int
    fill_id: int = 0
    restart_id: int | None = None
    row_multiple: int = 1

    def __post_init__(self) -> None:
        if len(self.head_sizes) != len(self.orders) * self.heads_per_order:
            raise ValueError(f"layer {self.layer_id}: {len(self.head_sizes)} head sizes for {self}")
        if len(self.multipliers) != max(self.orders):
            raise ValueError(
                f"layer {self.layer_id}: {len(self.multipliers)} multipliers for {self}"
            )
        if not all(0 < m <= _INT64_MAX for m in self.multipliers):
            raise ValueError(f"layer {self.layer_id}: multipliers must lie in [1, 2**63)")
        where = f"config.model.engram.rows_per_head: layer {self.layer_id}"
        low, high = min(self.head_sizes), max(self.head_sizes)
        if low < 1 or high > MAX_HEAD_SIZE:
            raise UserError(
                f"{where} would have heads of {low} to {high} rows: must be 2 to {MAX_HEAD_SIZE}"
            )
        if self.padded_rows > MAX_TABLE_ROWS:
            raise UserError(
                f"{where}'s table would have {self.padded_rows} rows: must be at most"
                f" {MAX_TABLE_ROWS} (addresses are int32, and the highest are no rows)"
            )

    @property
    def max_ngram(self) -> int:
        """N: the longest order; N - 1 ids of history are read."""
        return max(self.orders)

    @property
    def heads(self) -> int:
        """H: rows read per token."""
        return len(self.head_sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each head in the layer's table."""
        return tuple(sum(self.head_sizes[:j]) for j in range(self.heads))

    @property
    def rows(self) -> int:
        """R: rows that have an address."""
        return sum(self.head_sizes)

    @property
    def padded_rows(self) -> int:
        """Rows of the stored table: R rounded up to `row_multiple`."""
        return -(-self.rows // self.row_multiple) * self.row_multiple


def plan_layer(
    config: EngramConfig,
    canonical_vocab_size: int,
    *,
    fill_id: int = 0,
    restart_id: int | None = None,
) -> dict[int, LayerAddressing]:
    """Addressing of every Engram layer, keyed by 0-based layer id, in the order of `config.layers`.

    canonical_vocab_size: number of ids that are hashed (dialect "qwen": the raw vocabulary).
    Raises UserError for a geometry that the dialect does not define or that int32 cannot address.
    """
    if config.hash_dialect == QWEN:
        head_sizes = _qwen_head_sizes(config)
        multipliers = [
            _qwen_multipliers(config.seed, index, config.max_ngram, canonical_vocab_size)
            for index in range(len(config.layers))
        ]
    else:
        head_sizes = _paper_head_sizes(config)
        multipliers = [
            _paper_multipliers(config.seed, layer_id, config.max_ngram, canonical_vocab_size)
            for layer_id in config.layers
        ]
    padded = config.hash_dialect == QWEN
    if config.lookup == ONE_ROW:  # h mod 1: the same n-grams, hashed and told apart no more
        head_sizes, padded = [(1,) * config.heads for _ in config.layers], False
    return {
        layer_id: LayerAddressing(
            layer_id=layer_id,
            multipliers=multipliers[index],
            head_sizes=head_sizes[index],
            orders=config.orders,
            heads_per_order=config.heads_per_order,
            fill_id=fill_id,
            restart_id=restart_id,
            row_multiple=_QWEN_ROW_MULTIPLE if padded else 1,
        )
        for index, layer_id in enumerate(config.layers)
    }


def is_prime(n: int) -> bool:
    """Miller-Rabin with bases 2, 3, 5, 7: exact below 3,215,031,751, so for every head size."""
    if n < 2:
        return False
    for base in (2, 3, 5, 7):
        if n % base == 0:
            return n == base
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, n)
        if power in (1, n - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % n
            if power == n - 1:
                break
        else:
            return False
    return True


def _next_prime(start: int, taken: Collection[int] = ()) -> int:
    """Smallest prime >= start that is not taken."""
    while not is_prime(start) or start in taken:
        start += 1
    return start


def _paper_head_sizes(config: EngramConfig) -> list[tuple[int, ...]]:
    """Per layer and order: the next primes from its base up; none is used twice in the model."""
    taken: set[int] = set()
    layers = []
    for _ in config.layers:
        sizes: list[int] = []
        for base in config.base_rows:
            prime = base - 1
            for _ in range(config.heads_per_order):
                prime = _next_prime(prime + 1, taken)
                taken.add(prime)
                sizes.append(prime)
        layers.append(tuple(sizes))
    return layers


def _paper_multipliers(seed: int, layer_id: int, count: int, vocab: int) -> tuple[int, ...]:
    """m_k = 2 r_k + 1, r from NumPy's default generator; bounded so that id * m_k < 2**63."""
    high = max(1, _INT64_MAX // vocab // 2)
    generator = np.random.default_rng(seed + _LAYER_STEP * layer_id)
    draws = generator.integers(low=0, high=high, size=count, dtype=np.int64)
    return tuple(2 * int(r) + 1 for r in draws)


def _qwen_head_sizes(config: EngramConfig) -> list[tuple[int, ...]]:
    """Head g, counted over all memory layers, has the (g + 1)-th prime above base - 1."""
    if len(set(config.base_rows)) > 1:
        raise UserError(
            f"config.model.engram.rows_per_head = {config.rows_per_head!r}: must be one number"
            f" for all orders in hash dialect {QWEN!r}"
        )
    prime = config.base_rows[0] - 1
    layers = []
    for _ in config.layers:
        sizes = []
        for _ in range(config.heads):
            prime = _next_prime(prime + 1)
            sizes.append(prime)
        layers.append(tuple(sizes))
    return layers


def _qwen_multipliers(seed: int, index: int, count: int, vocab: int) -> tuple[int, ...]:
    """m_k = 2 (splitmix64(seed + 10007 index + gamma (k + 1)) mod bound) + 1.

    index: the layer's index among the memory layers, from 0.
    """
    bound = max(1, _INT64_MAX // vocab // 2)
    start = seed + _LAYER_STEP * index
    return tuple(
        2 * (_splitmix64((start + _GOLDEN_GAMMA * (k + 1)) & _MASK64) % bound) + 1
        for k in range(count)
    )


def _splitmix64(state: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): step the state by its increment, then mix it."""
    state = (state + _GOLDEN_GAMMA) & _MASK64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
    return state ^ (state >> 31)
