"""What a checkpoint does with a text, as JSON values: tokens, rows, gates, the next token.

Every length is padded to one of a few, for each of which one program is compiled. The last texts
are kept: to look at another token of one costs no computation. Threads may share an `Explorer`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.addressing.hash_numpy import canonicalise, lookback, mixes
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.analysis.texts import hashed_layers
from engram_jax.analysis.with_without import WithWithout, jit_with_without, of_text
from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.config import SCONE, Config, ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.explore.token_text import SAME, Shown, TokenText
from engram_jax.explore.training_text import READY, TrainingText

TOP = 8  # likeliest next tokens of either side
OTHERS = 4  # n-grams that are listed of those that read a row
KEPT = 16  # texts
SHORTEST, GROWTH = 32, 4  # of the padded lengths
DIGITS = 6  # of a number


def padded_lengths(capacity: int) -> tuple[int, ...]:
    """The lengths that texts of at most `capacity` tokens are padded to, ascending."""
    found = [capacity]
    while found[0] > SHORTEST * (GROWTH - 1):
        found.insert(0, -(-found[0] // GROWTH))
    return tuple(found)


def check_explores(config: Config) -> None:
    """Raises UserError for a model that has no memory with hashed rows."""
    engram = config.model.engram
    if not engram.layers:
        raise UserError("config.model.engram.layers = (): has no memory to explore")
    if engram.form == SCONE:
        raise UserError(
            f"config.model.engram.form = {SCONE!r}: its rows stand for no hash; --mode=explore"
            " shows memories whose rows do"
        )


class Explorer:
    """A checkpoint. serve: its capacity is the most tokens of a text; layers and orders that it
    switches off are off."""

    def __init__(self, trained: LoadedModel, serve: ServeConfig, text: TrainingText):
        addressing = trained.program.addressing
        assert addressing is not None
        self.capacity, self._off = serve.capacity, serve
        self._trained, self._training = trained, text
        self._compression = addressing.compression
        self._layers = {layer.layer_id: layer for layer in hashed_layers(addressing)}
        self._shown = TokenText(trained.tokenizer, addressing)
        self._function = jit_with_without(trained.program, serve, TOP)
        self._compiled: dict[int, Any] = {}
        self._compiling, self._keeping = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[bytes, WithWithout] = OrderedDict()

    @property
    def name(self) -> str:
        """The checkpoint, in a line."""
        return self._trained.name

    # The network

    def compiled(self, length: int) -> Any:
        """The program for one of `padded_lengths`, compiled at the first call."""
        if length not in self._compiled:
            with self._compiling:
                if length not in self._compiled:
                    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
                    lowered = self._function.lower(self._trained.weights, tokens)
                    self._compiled[length] = lowered.compile()
        return self._compiled[length]

    def ids(self, prompt: str) -> np.ndarray:
        """int32 [n], n may be 0. Raises UserError for more than `capacity`."""
        ids = np.array(encode_batch(self._trained.tokenizer, [prompt])[0].ids, np.int32)
        if len(ids) > self.capacity:
            raise UserError(f"text: has {len(ids)} tokens; must have at most {self.capacity}")
        return ids

    def read(self, ids: np.ndarray) -> WithWithout:
        """ids: int32 [n], n from 1 to `capacity`."""
        key = ids.tobytes()
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        length = next(n for n in padded_lengths(self.capacity) if n >= len(ids))
        padded = np.zeros(length, np.int32)
        padded[: len(ids)] = ids
        found = of_text(self.compiled(length)(self._trained.weights, padded), len(ids))
        with self._keeping:
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    # As JSON values

    def look(self, prompt: str, at: int | None = None) -> dict[str, Any]:
        """Everything about a text, and about its token `at` (None = the last one). Raises UserError
        for a text that is too long, or without such a token."""
        ids = self.ids(prompt)
        at = len(ids) - 1 if at is None else at
        if len(ids) and not 0 <= at < len(ids):
            raise UserError(f"at = {at}: must be a token of the text, 0 to {len(ids) - 1}")
        found = self.read(ids) if len(ids) else None
        canonical = canonicalise(ids, self._compression)
        return {
            "model": self._model(),
            "training": {"state": self._training.state, "line": self._training.line},
            "tokens": [
                {
                    "id": int(raw),
                    **self._shown.raw(int(raw), inside=place > 0),
                    "canonical": {"id": int(own), **self._shown.canonical(int(own))},
                }
                for place, (raw, own) in enumerate(zip(ids, canonical, strict=True))
            ],
            "gates": {} if found is None else {k: _list(gate) for k, gate in found.gates.items()},
            "effect": [] if found is None else _list(found.divergence),
            "chosen": None if found is None else self._chosen(ids, canonical, at, found),
        }

    def _model(self) -> dict[str, Any]:
        config, trained = self._trained.program.config, self._trained
        engram = config.model.engram
        return {
            "name": config.name,
            "run": trained.run,
            "step": trained.step,
            "capacity": self.capacity,
            "orders": list(engram.orders),
            "layers": [
                {"layer": k, "rows": layer.rows, "off": self._off.is_off(k)}
                for k, layer in self._layers.items()
            ],
            "offOrders": list(self._off.off_orders),
            "untouchedNorm": _number(engram.init_std * math.sqrt(engram.dim)),
            "example": max(config.train.samples, key=len, default=""),
        }

    def _chosen(
        self, ids: np.ndarray, canonical: np.ndarray, at: int, found: WithWithout
    ) -> dict[str, Any]:
        own = int(canonical[at])
        members = self._shown.members(own)
        back = lookback(canonical, next(iter(self._layers.values())))
        windows = {
            order: np.array([x[at] for x in back[:order][::-1]])
            for order in next(iter(self._layers.values())).orders
        }
        return {
            "at": at,
            "same": [self._shown.raw(int(raw)) for raw in members[:SAME]],
            "sameMore": max(0, len(members) - SAME),
            "ngrams": [
                {"order": order, "items": self._items(window), "count": self._count(order, window)}
                for order, window in windows.items()
            ],
            "layers": [
                {"layer": k, "orders": self._orders(layer, at, back, windows, found)}
                for k, layer in self._layers.items()
            ],
            "effect": _number(found.divergence[at]),
            "next": self._next(found, at),
            "coming": None if at + 1 == len(ids) else self._coming(found, at, int(ids[at + 1])),
        }

    def _orders(
        self,
        layer: LayerAddressing,
        at: int,
        back: list[np.ndarray],
        windows: dict[int, np.ndarray],
        found: WithWithout,
    ) -> list[dict[str, Any]]:
        """Of each order: what is hashed, and the heads' rows."""
        mixed = mixes([x[at : at + 1] for x in back], layer)
        key, each = str(layer.layer_id), layer.heads_per_order
        return [
            {
                "order": order,
                # Numbers of 64 bits are no JSON numbers of a browser.
                "multipliers": [str(m) for m in layer.multipliers[:order]],
                "mixed": str(int(mixed[i][0])),
                "heads": [
                    {
                        "head": head % each,
                        "prime": layer.head_sizes[head],
                        "offset": layer.offsets[head],
                        "row": int(found.addresses[key][at, head]),
                        "norm": _number(found.norms[key][at, head]),
                        **self._readers(layer, int(found.addresses[key][at, head]), windows[order]),
                    }
                    for head in range(i * each, (i + 1) * each)
                ],
            }
            for i, order in enumerate(layer.orders)
        ]

    def _readers(self, layer: LayerAddressing, row: int, own: np.ndarray) -> dict[str, Any]:
        """Of a row: how many training tokens read it, and n-grams other than `own` that do."""
        if self._training.state != READY or self._training.counted is None:
            return {"reads": None, "others": [], "othersMore": 0}
        readers = self._training.counted.readers[layer.layer_id].of(row, OTHERS + 1)
        pairs = zip(readers.windows, readers.counts, strict=True)
        others = [(w, n) for w, n in pairs if not np.array_equal(w, own)][:OTHERS]
        known = self._training.counted.counts[len(own)].of(own[None])[0] > 0
        return {
            "reads": readers.reads,
            "others": [{"items": self._items(w), "count": int(n)} for w, n in others],
            "othersMore": readers.total - int(known) - len(others),
        }

    def _count(self, order: int, window: np.ndarray) -> int | None:
        counted = self._training.counted
        return None if counted is None else int(counted.counts[order].of(window[None])[0])

    def _items(self, window: Iterable[int]) -> list[Shown]:
        """An n-gram's canonical ids, oldest first. What stands before a document is no token."""
        fill, found = next(iter(self._layers.values())).fill_id, list[Shown]()
        for token in map(int, window):
            before = token == fill and all("start" in item for item in found)
            shown = {"start": True} if before else self._shown.canonical(token)
            found.append({"id": token, **shown})
        return found

    def _next(self, found: WithWithout, at: int) -> list[dict[str, Any]]:
        """The likeliest next tokens of both sides, by the larger probability."""
        rows = zip(found.candidates[at], found.log_with[at], found.log_without[at], strict=True)
        each = {int(token): (math.exp(a), math.exp(b)) for token, a, b in rows}
        ordered = sorted(each.items(), key=lambda pair: -max(pair[1]))
        return [
            {"id": t, **self._shown.raw(t), "with": _number(a), "without": _number(b)}
            for t, (a, b) in ordered
        ]

    def _coming(self, found: WithWithout, at: int, token: int) -> dict[str, Any]:
        sides = {"with": found.next_with[at], "without": found.next_without[at]}
        shown = self._shown.raw(token)
        return {"id": token, **shown, **{k: _number(math.exp(x)) for k, x in sides.items()}}


def _number(value: Any) -> float | None:
    """None of what is no number: a run may have diverged."""
    value = float(value)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _list(values: np.ndarray) -> list[Any]:
    return [_number(x) if np.ndim(x) == 0 else _list(x) for x in values]
