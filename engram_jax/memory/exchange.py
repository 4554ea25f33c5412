"""All-to-all exchange of rows and gradients for tables sharded by rows over a mesh.

Row a of a table of R rows is on device a mod n (n devices), so every head, whatever its order, is
spread evenly. A step

    plan   sort this device's lookups by (owner, row) and drop duplicates         no communication
    fetch  ask the owners for the distinct rows, and get them                     2 all-to-all
    send   sum the gradients of equal rows locally, send the sums to the owners   1 all-to-all
    apply  owners sum what they received for a row, and update it in place        (training/optim/)

costs a device what its own lookups need, however many devices there are. An all-to-all moves a
fixed number of rows (`capacity`) between any two devices. Where some device wants more rows of one
owner than that, the owners' rows are split into ranges until no device wants more than `capacity`
rows of a range, and every range gets its own round (the metric
`extra_rounds/LAYER` counts them): nothing is dropped, and all gradients of a row
arrive in the same round, so what is exact for one round is exact for many.

On one device a plan is the list of distinct rows, and nothing is exchanged.

Symbols: n devices, N lookups of one device, C capacity, L rows of the table per device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from engram_jax.memory.row_gradients import (
    Distinct,
    RowGradients,
    deduplicate,
    find_distinct,
    sum_equal,
)
from engram_jax.memory.table import TableLayout
from engram_jax.sharding.rules import AXES, BATCH, P
from engram_jax.sharding.sequence import device_order

ROW_SHARDED = P(AXES)  # one shard per device
# Addresses and rows [B, T, ...], T in device order (sharding/sequence.py): a tensor group, whose
# devices have the same tokens, shares the lookups.
LOOKUPS = P(BATCH, ("sequence", "tensor"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExchangePlan:
    """What one step wants of one table. Per device (all devices' arrays joined on axis 0):

    distinct: the distinct rows by where they are stored: owner * L + the owner's local row.
    rounds: int32 [], equal on all devices, a power of two.
    """

    distinct: Distinct
    rounds: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sent:
    """Summed gradients on their way. Per device:

    sums: [N, dim] by distinct row of this device's lookups, in at least float32.
    arrived: the gradients of the rows this device owns, of the first round; addresses are local
      rows.
    squares: [], replicated: the sum of squares of all rows' gradients of all rounds.
    touched: int32 [], replicated: distinct rows that all devices together looked up.
    """

    sums: jax.Array
    arrived: RowGradients
    squares: jax.Array
    touched: jax.Array


@dataclass(frozen=True)
class Exchange:
    """The exchange of one table; static. capacity: C, not used on one device."""

    mesh: Mesh
    layout: TableLayout
    capacity: int

    # ---- on all devices ------------------------------------------------------------------------

    def plan(self, addresses: jax.Array) -> ExchangePlan:
        """addresses: int32 [B, T, H], rows of the table in natural order, as the tokens."""
        return self._each(self._plan, (LOOKUPS,), _PLAN)(self._of_devices(addresses))

    def fetch(
        self, rows: jax.Array, addresses: jax.Array, plan: ExchangePlan, dtype: Any
    ) -> jax.Array:
        """The exact rows [B, T, H, dim] in `dtype`, their tokens in device order; rows: the table,
        [n L, dim] as stored."""
        fetch = partial(self._fetch, dtype=jnp.dtype(dtype))
        specs = (ROW_SHARDED, LOOKUPS, _PLAN)
        return self._each(fetch, specs, LOOKUPS)(rows, self._of_devices(addresses), plan)

    def _of_devices(self, addresses: jax.Array) -> jax.Array:
        return device_order(addresses, self.mesh.shape["sequence"])

    def send(self, gradients: jax.Array, plan: ExchangePlan) -> Sent:
        """gradients: [B, T, H, dim], one per lookup, in the order of `fetch`."""
        return self._each(self._send, (LOOKUPS, _PLAN), _SENT)(gradients, plan)

    def apply(
        self,
        update: Callable[..., tuple[Any, jax.Array]],
        table: Any,
        plan: ExchangePlan,
        sent: Sent,
        factor: jax.Array,
        apply: jax.Array,
        scalars: tuple[jax.Array, ...],
    ) -> tuple[Any, jax.Array]:
        """Every owner updates the rows whose gradients arrived: in place, if `table` is donated.

        update: (table, gradients of its rows, those rows' addresses in natural order, *scalars)
          -> (table, int32 []); runs on each device's shard.
        factor: float32 [], multiplies the gradients. apply: bool [], False = change nothing.

        Returns the table and the sum of the counts.
        """
        n = self.layout.devices

        def on_device(table: Any, plan: ExchangePlan, sent: Sent, *now: Any) -> tuple[Any, Any]:
            factor, apply, scalars = now

            def one(table: Any, arrived: RowGradients) -> tuple[Any, jax.Array]:
                address = arrived.addresses
                if n > 1:
                    address = address * n + lax.axis_index(AXES)
                return update(table, arrived.scaled(factor).only_if(apply), address, *scalars)

            def further(index: jax.Array, carry: Any) -> Any:
                table, seen = one(carry[0], self._arrive(sent.sums, plan, index))
                return table, carry[1] + seen

            first = one(table, sent.arrived)
            if n == 1:
                return first
            table, seen = lax.fori_loop(1, plan.rounds, further, first)
            return table, lax.psum(seen, AXES)

        specs = (ROW_SHARDED, _PLAN, _SENT, P(), P(), P())
        run = self._each(on_device, specs, (ROW_SHARDED, P()))
        return run(table, plan, sent, factor, apply, scalars)

    def _each(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    # ---- on each device ------------------------------------------------------------------------

    def _plan(self, addresses: jax.Array) -> ExchangePlan:
        n, length = self.layout.devices, self.layout.rows_per_device
        addresses = addresses.reshape(-1)
        distinct = find_distinct(addresses % n * length + addresses // n, n * length)
        rounds = self._rounds(distinct.rows) if n > 1 else jnp.ones((), jnp.int32)
        return ExchangePlan(_listed(distinct), rounds)

    def _rounds(self, distinct: jax.Array) -> jax.Array:
        """The least power of two of rounds in which no device wants more than C rows of another."""
        position = jnp.arange(distinct.size, dtype=jnp.int32)
        owner, row = distinct // self.layout.rows_per_device, distinct % self.layout.rows_per_device

        def most(rounds: jax.Array) -> jax.Array:
            """Most rows that one device wants of one range of one owner."""
            part = row // self._range(rounds)
            new = (owner[1:] != owner[:-1]) | (part[1:] != part[:-1])
            start = lax.cummax(jnp.where(jnp.concatenate([jnp.ones(1, bool), new]), position, 0))
            wanted = jnp.where(owner < self.layout.devices, position - start + 1, 0)
            return lax.pmax(jnp.max(wanted), AXES)

        def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return 2 * carry[0], most(2 * carry[0])

        one = jnp.ones((), jnp.int32)
        return lax.while_loop(lambda c: c[1] > self.capacity, more, (one, most(one)))[0]

    def _range(self, rounds: jax.Array) -> jax.Array:
        """Rows of an owner that one round serves."""
        return (self.layout.rows_per_device + rounds - 1) // rounds

    def _bounds(self, plan: ExchangePlan, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which distinct rows round `index` asks every owner for: [low, high), int32 [n] each."""
        length, size = self.layout.rows_per_device, self._range(plan.rounds)
        base = jnp.arange(self.layout.devices, dtype=jnp.int32) * length
        low = base + jnp.minimum(index * size, length)
        high = base + jnp.minimum((index + 1) * size, length)
        found = jnp.searchsorted(plan.distinct.rows, jnp.concatenate([low, high])).astype(jnp.int32)
        return found[: low.size], found[low.size :]

    def _wanted(self, plan: ExchangePlan, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of round `index`: positions in `distinct` [n, C], unused ones N; the owners' local rows
        [n, C], unused ones L."""
        low, high = self._bounds(plan, index)
        position = low[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)
        there = position < high[:, None]
        position = jnp.where(there, position, plan.distinct.rows.size)
        stored = plan.distinct.rows.at[position].get(mode="fill", fill_value=0)
        base = (
            jnp.arange(self.layout.devices, dtype=jnp.int32)[:, None] * self.layout.rows_per_device
        )
        return position, jnp.where(there, stored - base, self.layout.rows_per_device)

    def _fetch(
        self, rows: jax.Array, addresses: jax.Array, plan: ExchangePlan, dtype: jnp.dtype
    ) -> jax.Array:
        if self.layout.devices == 1:
            return _converted(rows.at[addresses].get(mode="promise_in_bounds"), dtype)

        def serve(index: jax.Array) -> jax.Array:
            """[n C, dim]: the rows of one round, owner by owner."""
            asked = _swap(self._wanted(plan, index)[1])
            answer = _converted(rows.at[asked].get(mode="fill", fill_value=0), dtype)
            # As integers, past which XLA moves no conversion: a TPU multiplies float32 as
            # bfloat16, and XLA would convert the whole table for it.
            bits = lax.bitcast_convert_type(answer, _UNSIGNED[dtype.itemsize])
            return lax.bitcast_convert_type(_swap(bits), dtype).reshape(-1, rows.shape[1])

        def place(index: jax.Array) -> jax.Array:
            """Distinct row -> its index in a round's rows [n C]; n C if another round serves it."""
            low, high = self._bounds(plan, index)
            owner = jnp.minimum(
                plan.distinct.rows // self.layout.rows_per_device, self.layout.devices - 1
            )
            rank = jnp.arange(plan.distinct.rows.size, dtype=jnp.int32) - low[owner]
            inside = (rank >= 0) & (rank < (high - low)[owner])
            nowhere = self.layout.devices * self.capacity
            return jnp.where(inside, owner * self.capacity + rank, nowhere)

        distinct = plan.distinct
        slot = jnp.zeros_like(distinct.slot).at[distinct.order].set(distinct.slot)  # by lookup

        def read(index: jax.Array, found: jax.Array | int) -> jax.Array:
            at = place(index)[slot]
            got = serve(index)
            here = (at < len(got))[:, None]
            return jnp.where(here, got.at[at].get(mode="fill", fill_value=0), found)

        found = lax.fori_loop(1, plan.rounds, read, read(jnp.int32(0), 0))
        return found.reshape(*addresses.shape, rows.shape[1])

    def _send(self, gradients: jax.Array, plan: ExchangePlan) -> Sent:
        sums = sum_equal(gradients.reshape(plan.distinct.rows.size, -1), plan.distinct)
        if self.layout.devices == 1:
            arrived = RowGradients(plan.distinct.rows, sums, plan.distinct.count)
            return Sent(sums, arrived, jnp.sum(sums * sums), arrived.count[0])
        arrived = self._arrive(sums, plan, jnp.int32(0))

        def measure(gradients: RowGradients) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(gradients.values * gradients.values), gradients.count

        def further(index: jax.Array, total: Any) -> Any:
            return jax.tree.map(jnp.add, total, measure(self._arrive(sums, plan, index)))

        total = lax.fori_loop(1, plan.rounds, further, measure(arrived))
        squares, touched = lax.psum(total, AXES)
        return Sent(sums, _listed(arrived), squares, touched)

    def _arrive(self, sums: jax.Array, plan: ExchangePlan, index: jax.Array) -> RowGradients:
        """The gradients that all devices send of the rows this device owns in round `index`."""
        position, asked = self._wanted(plan, index)
        values = _swap(sums.at[position].get(mode="fill", fill_value=0))
        found = deduplicate(_swap(asked), values)
        # Unused slots hold the sentinel L; deduplicated, it counts as one more distinct row.
        return RowGradients(
            found.addresses,
            found.values,
            jnp.sum(found.addresses < self.layout.rows_per_device, dtype=jnp.int32),
        )


def _swap(x: jax.Array) -> jax.Array:
    """All-to-all: x [n, ...], a chunk for each device -> the chunk that each has for this one."""
    return lax.all_to_all(x, AXES, split_axis=0, concat_axis=0, tiled=True)


_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _converted(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Gathered rows in `dtype`, rounded in a separate step: XLA would otherwise convert the whole
    table first, once for all rounds, and gather from the copy."""
    if rows.dtype == jnp.float32 and dtype == jnp.bfloat16:
        rows = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
    return rows.astype(dtype)


def _listed(x: Any) -> Any:
    """With `count` as [1], so that the devices' counts can be joined on axis 0."""
    return dataclasses.replace(x, count=x.count[None])


_PER_DEVICE: Any = ROW_SHARDED
_SAME: Any = P()
_DISTINCT = Distinct(_PER_DEVICE, _PER_DEVICE, _PER_DEVICE, _PER_DEVICE)
_ARRIVED = RowGradients(_PER_DEVICE, _PER_DEVICE, _PER_DEVICE)
_PLAN = ExchangePlan(_DISTINCT, _SAME)
_SENT = Sent(_PER_DEVICE, _ARRIVED, _SAME, _SAME)


# ---- orders of rows --------------------------------------------------------------------------


def natural_order(mesh: Mesh, layout: TableLayout, x: jax.Array) -> jax.Array:
    """[n L, ...] as stored -> [n L, ...] by address, sharded evenly over the devices."""
    if layout.devices == 1:
        return x

    def local(x: jax.Array) -> jax.Array:  # local row i is address i n + device
        got = _swap(x.reshape(layout.devices, -1, *x.shape[1:]))
        return got.swapaxes(0, 1).reshape(x.shape)

    return _reorder(mesh, local)(x)


def stored_order(mesh: Mesh, layout: TableLayout, x: jax.Array) -> jax.Array:
    """The inverse of `natural_order`."""
    if layout.devices == 1:
        return x

    def local(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, layout.devices, *x.shape[1:]).swapaxes(0, 1)
        return _swap(parts).reshape(x.shape)

    return _reorder(mesh, local)(x)


def _reorder(mesh: Mesh, local: Callable) -> Callable:
    return jax.shard_map(
        local, mesh=mesh, in_specs=ROW_SHARDED, out_specs=ROW_SHARDED, check_vma=False
    )
