"""Every form of the hash against Python's unbounded integers: any layout, any documents.

Shapes are the same in all examples, and the jnp form runs as it is, operation by operation: nothing
is compiled for an example.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engram_jax.addressing import LayerAddressing, hash_jax, hash_numpy, plan_layer
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.hash_batches import BatchAddresser
from engram_jax.addressing.hash_tokens import Hasher
from engram_jax.config import MAX_HEAD_SIZE, EngramConfig
from tests.properties import examples

B, T = 2, 12
ORDERS, PER_ORDER = (2, 3), 2
PAST = max(ORDERS) - 1
VOCAB = 40


def plain_addresses(ids, layer, segments=None, history=None) -> list[list[int]]:
    """One row's addresses by the definition: ids [T] of Python integers -> [T][H]."""
    past = layer.max_ngram - 1
    before = [layer.fill_id] * past if history is None else list(history)
    everything = [*before, *ids]
    documents = [0] * len(ids) if segments is None else list(segments)
    documents = [documents[0]] * past + documents
    out = []
    for t in range(past, len(everything)):
        mix, inside, row = 0, True, []
        for back in range(layer.max_ngram):
            x = everything[t - back]
            if back:
                inside &= documents[t - back] == documents[t] and x != layer.restart_id
                x = x if inside else layer.fill_id
            mix ^= (x * layer.multipliers[back] + 2**63) % 2**64 - 2**63  # int64, wrapping
            if back + 1 in layer.orders:
                for _ in range(layer.heads_per_order):
                    head = len(row)
                    row.append(mix % layer.head_sizes[head] + sum(layer.head_sizes[:head]))
        out.append(row)
    return out


def layouts(orders=ORDERS, per_order=PER_ORDER):
    """Layers of any numbers, primes or not, of one shape."""
    sizes = st.integers(2, 2**28) | st.integers(2, 9) | st.just(2**28)
    heads = len(orders) * per_order
    numbers = st.integers(1, 2**63 - 1)
    return st.builds(
        LayerAddressing,
        layer_id=st.just(1),
        multipliers=st.tuples(*[numbers] * max(orders)),
        head_sizes=st.tuples(*[sizes] * heads),
        orders=st.just(orders),
        heads_per_order=st.just(per_order),
        fill_id=st.integers(0, 3),
        restart_id=st.none() | st.integers(0, 3),
    )


INT32 = np.iinfo(np.int32)
few = st.integers(-2, 5)  # so that restarts and the fill id come up
any_id = few | st.integers(INT32.min, INT32.max)
ids = hnp.arrays(np.int32, (B, T), elements=any_id)
histories = hnp.arrays(np.int32, (B, PAST), elements=any_id)
documents = hnp.arrays(np.int32, (B, T), elements=st.integers(0, 1)).map(
    lambda starts: np.cumsum(starts, axis=1, dtype=np.int32)
)


@examples(60)
@given(layer=layouts(), ids=ids, segments=documents, history=histories)
def test_numpy_and_jnp(layer, ids, segments, history):
    wanted = [
        plain_addresses(*row)
        for row in zip(ids.tolist(), [layer] * B, segments.tolist(), history.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(hash_numpy.addresses(ids, layer, segments, history), wanted)
    np.testing.assert_array_equal(hash_jax.addresses(ids, layer, segments, history), wanted)


@examples(60)
@given(layer=layouts((1, 2, 3, 4), 1), ids=ids)
def test_a_document_by_itself(layer, ids):
    """Without segments and history, with another number of orders, from unigrams on."""
    wanted = [plain_addresses(row, layer) for row in ids.tolist()]
    np.testing.assert_array_equal(hash_numpy.addresses(ids, layer), wanted)
    np.testing.assert_array_equal(hash_jax.addresses(ids, layer), wanted)


raw_ids = hnp.arrays(np.int32, (B, T), elements=st.integers(-2, VOCAB - 1))
compressions = st.none() | hnp.arrays(np.int32, VOCAB, elements=st.integers(0, 5))


def addressing(layers, compression) -> Addressing:
    return Addressing(compression, VOCAB, 0, layers, "paper", -1, "")


def canonical(raw, compression):
    """Python integers [B][T]; masked ids as they are."""
    if compression is None:
        return raw.tolist()
    return [[x if x < 0 else int(compression[x]) for x in row] for row in raw.tolist()]


@examples(60)
@given(one=layouts(), two=layouts(), compression=compressions, raw=raw_ids, segments=documents)
def test_the_data_pipeline_s_batches(one, two, compression, raw, segments):
    found = BatchAddresser(addressing({1: one, 4: two}, compression))(raw, segments)
    rows = canonical(raw, compression)
    for name, layer in (("1", one), ("4", two)):
        wanted = [
            plain_addresses(row, layer, own)
            for row, own in zip(rows, segments.tolist(), strict=True)
        ]
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], wanted)


@examples(60)
@given(layer=layouts(), compression=compressions, raw=raw_ids, cut=st.integers(0, T))
def test_the_serving_engine_s_portions(layer, compression, raw, cut):
    """Two portions of any lengths, the second behind the first one's history."""
    hasher = Hasher(addressing({1: layer}, compression))
    history, found = np.stack([hasher.empty()] * B), []
    for new in (raw[:, :cut], raw[:, cut:]):
        both = np.concatenate([history, hasher.canonical(new)], axis=1)
        found.append(hasher.addresses("1", both))
        history = both[:, -PAST:]
    wanted = [plain_addresses(row, layer) for row in canonical(raw, compression)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)


@examples(100)
@given(
    dialect=st.sampled_from(["paper", "qwen"]),
    rows=st.integers(2, 20_000),
    heads=st.integers(1, 4),
    orders=st.sampled_from([(2,), (2, 3), (2, 3, 4)]),
    layers=st.sampled_from([(0,), (1, 4), (0, 2, 3)]),
    vocab=st.integers(1, 300_000),
    seed=st.integers(0, 2**31),
)
def test_any_plan_has_primes_of_its_own_and_products_that_do_not_wrap(
    dialect, rows, heads, orders, layers, vocab, seed
):
    config = EngramConfig(
        layers=layers,
        orders=orders,
        heads_per_order=heads,
        rows_per_head=(rows,),
        d_mem=len(orders) * heads * 4,
        seed=seed,
        hash_dialect=dialect,
    )
    plan = plan_layer(config, vocab)
    assert tuple(plan) == layers
    sizes = [size for layer in plan.values() for size in layer.head_sizes]
    assert len(set(sizes)) == len(sizes) and rows <= min(sizes) <= max(sizes) <= MAX_HEAD_SIZE
    for size in set(sizes):
        assert all(size % divisor for divisor in range(2, int(size**0.5) + 1))
    # None is left out: the sizes are all primes between the least and the largest.
    between = [n for n in range(rows, max(sizes)) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert sorted(sizes) == [*between, max(sizes)]
    for layer in plan.values():
        assert all(m % 2 == 1 and (vocab - 1) * m < 2**63 for m in layer.multipliers)
