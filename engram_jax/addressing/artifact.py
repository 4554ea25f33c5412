"""Everything that decides an address (primes, multipliers, compression), saved with checkpoints.

A table is useless under other addresses, and NumPy does not promise that a generator's stream stays
the same between versions. So the numbers themselves are stored, with a fingerprint over all of
them, and a checkpoint made under one fingerprint is refused under another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_jax.addressing.case_classes import build_case_classes
from engram_jax.addressing.compression import build_compression
from engram_jax.addressing.fgrams import FgramAddressing
from engram_jax.addressing.hash_plan import LayerAddressing, plan_layer
from engram_jax.addressing.tokenizer import (
    former_fingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_size,
)
from engram_jax.config import HASHED, QWEN, SCONE, Config, TokenizerConfig
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_arrays, read_json, reason_of
from engram_jax.hardware.storage import replacing, write_text

_JSON, _NPZ = "addressing.json", "addressing.npz"
_FORMAT = 1
_MAPS = ("compression", "case")  # arrays, stored in the .npz
_LATER = {"lookup": HASHED, "signs": False, "case": False}  # values that need not be stored


@dataclass(frozen=True, eq=False)
class Addressing:
    """From token ids to rows, for all Engram layers of a model.

    compression: int32 [V_tok] canonical id per raw id; None = raw ids are used (dialect "qwen",
      f-grams, or config.model.engram.compression is off), or no tokenizer was given (describe,
      compile).
    canonical_vocab_size: number of ids that are hashed.
    pad_id: canonical id of the tokenizer's pad id.
    layers: addressing of each Engram layer by 0-based layer id.
    dialect: "paper" or "qwen".
    eos_id: raw end-of-sequence id, -1 = none.
    tokenizer_fingerprint: SHA-256 of the tokenizer, "" = none was given.
    lookup, signs: of config.model.engram.
    case: int32 [V_tok], the class (case_classes.py) per raw id; None = it is not kept, or no
      tokenizer was given.

    Compare two by `fingerprint`.
    """

    compression: np.ndarray | None
    canonical_vocab_size: int
    pad_id: int
    layers: Mapping[int, LayerAddressing | FgramAddressing]
    dialect: str
    eos_id: int
    tokenizer_fingerprint: str
    lookup: str = HASHED
    signs: bool = False
    case: np.ndarray | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides an address: tokenizer, map, multipliers, primes, fill."""
        numbers = self._numbers()
        del numbers["eos_id"]  # decides no address, except as a layer's restart_id
        digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
        digest.update(_bytes(self.compression))
        digest.update(_bytes(self.case))
        return digest.hexdigest()

    def _numbers(self) -> dict[str, Any]:
        """Everything but the maps, as JSON values. What `_LATER` names is there unless it has its
        default: fingerprints from before it existed stay the same."""
        layers = [_as_json(layer) for _, layer in sorted(self.layers.items())]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        maps = {name: getattr(self, name) is not None for name in _MAPS}
        found = {**fields, "layers": layers, **maps}
        return {k: v for k, v in found.items() if k not in _LATER or v != _LATER[k]}

    def save(self, directory: str | Path) -> None:
        """Write addressing.json and addressing.npz into `directory` (created if missing).

        The JSON file is written last, atomically: where it exists, both are complete.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in _MAPS if getattr(self, name) is not None}
        for layer in self.layers.values():
            if isinstance(layer, FgramAddressing) and layer.ngrams is not None:
                tables = zip(layer.orders, layer.ngrams, strict=True)
                arrays |= {f"fgrams_{n}": table for n, table in tables}
        if arrays:
            with replacing(folder / _NPZ, shared=False) as file:
                np.savez_compressed(file, **arrays)
        state = {"format": _FORMAT, "fingerprint": self.fingerprint, **self._numbers()}
        write_text(folder / _JSON, json.dumps(state, indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Addressing:
        """Read what `save` wrote. Raises UserError when it is missing, broken or modified."""
        folder = Path(directory)
        state = read_json(folder / _JSON, "addressing")
        try:
            there = [name for name in _MAPS if state.get(name, False)]
            arrays: dict[str, np.ndarray] = {}
            if there or any("fgrams" in values for values in state["layers"]):
                with open_arrays(folder / _NPZ, "addressing") as archive:
                    arrays = {name: archive[name] for name in archive}
            layers = [_layer(values, arrays) for values in state["layers"]]
            maps: dict[str, Any] = dict.fromkeys(_MAPS) | {name: arrays[name] for name in there}
            found = cls(
                **maps,
                canonical_vocab_size=state["canonical_vocab_size"],
                pad_id=state["pad_id"],
                layers={layer.layer_id: layer for layer in layers},
                dialect=state["dialect"],
                eos_id=state["eos_id"],
                tokenizer_fingerprint=state["tokenizer_fingerprint"],
                lookup=state.get("lookup", HASHED),
                signs=state.get("signs", False),
            )
            stored = state["fingerprint"]
        except UserError:
            raise
        except Exception as error:  # whatever a truncated or foreign file raises
            raise UserError(
                f"addressing in {shown(folder)}: cannot be read ({reason_of(error)})"
            ) from error
        if found.fingerprint != stored:
            raise UserError(
                f"addressing in {folder}: damaged; its fingerprint is {found.fingerprint},"
                f" the file says {stored}"
            )
        return found


def _bytes(ids: np.ndarray | None) -> bytes:
    return b"" if ids is None else np.ascontiguousarray(ids, "<i4").tobytes()


def _as_json(layer: LayerAddressing | FgramAddressing) -> dict[str, Any]:
    return layer.numbers() if isinstance(layer, FgramAddressing) else dataclasses.asdict(layer)


def _layer(
    values: dict[str, Any], arrays: dict[str, np.ndarray]
) -> LayerAddressing | FgramAddressing:
    if "fgrams" in values:
        orders = tuple(values["orders"])
        tables = tuple(arrays[f"fgrams_{n}"] for n in orders)
        return FgramAddressing(values["layer_id"], orders, values["count"], tables)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return LayerAddressing(**fields)


def check_same(stored: Addressing, mine: Addressing) -> None:
    """Raise UserError, naming both fingerprints and what differs, unless the two are the same."""
    if stored.fingerprint == mine.fingerprint:
        return
    theirs, ours = stored._numbers(), mine._numbers()
    names = [*theirs, *(name for name in ours if name not in theirs)]
    different = [n for n in names if n != "eos_id" and theirs.get(n) != ours.get(n)]
    for name in _MAPS:
        same = _bytes(getattr(stored, name)) == _bytes(getattr(mine, name))
        if not same and name not in different:
            different.append(name)
    message = (
        f"addressing {stored.fingerprint} (stored with the checkpoint) differs from"
        f" {mine.fingerprint} (this configuration and tokenizer) in {', '.join(different)}:"
        " its tables would be read at the wrong rows"
    )
    if "tokenizer_fingerprint" in different:
        message += (
            "; the tokenizer is another one, or the text that it is trained on has changed (the"
            " embedded text does with another Python version), or older code, which read some"
            " tokenizers otherwise, has trained it: go back to them, or start a new run with"
            " another --workdir"
        )
    raise UserError(message)


def as_stored(mine: Addressing, workdir: str | Path) -> Addressing:
    """`mine`, with the f-grams, or the tokenizer fingerprint, that a run in `workdir` has stored.

    F-grams are counted on the text that the run was trained on; whoever reads its table reads them
    from here. Training, which has that text, compares instead.

    Earlier versions included the post-processor in the fingerprint, though it changes no id of a
    text. If the run's tokenizer.json shows that the tokenizer is the same, the stored fingerprint
    is adopted; otherwise `mine` is returned unchanged.
    """
    folder = Path(workdir)
    if not (folder / "addressing" / _JSON).is_file() or not (folder / "tokenizer.json").is_file():
        return mine
    stored = Addressing.load(folder / "addressing")
    if any(isinstance(layer, FgramAddressing) for layer in mine.layers.values()):
        return dataclasses.replace(mine, layers=stored.layers)
    known = stored.tokenizer_fingerprint
    if known == mine.tokenizer_fingerprint or known != former_fingerprint(folder):
        return mine
    same = tokenizer_fingerprint(load_tokenizer(folder)) == mine.tokenizer_fingerprint
    return dataclasses.replace(mine, tokenizer_fingerprint=known) if same else mine


def build_addressing(config: Config, tokenizer: Tokenizer | None = None) -> Addressing:
    """The addressing of a configuration.

    tokenizer: None = not available (describe, compile): dialect "paper" then takes the recorded
      `config.tokenizer.canonical_vocab_size`, no compression and the raw pad id.

    Raises UserError naming the key when the recorded sizes and the tokenizer disagree.
    """
    tokens, engram = config.tokenizer, config.model.engram
    if tokenizer is not None and tokenizer_size(tokenizer) > tokens.vocab_size:
        raise UserError(
            f"config.tokenizer.vocab_size = {tokens.vocab_size}: must be at least the tokenizer's"
            f" {tokenizer_size(tokenizer)} ids"
        )
    if engram.hashes_raw_ids:
        compression, canonical_size, pad_id = None, tokens.vocab_size, tokens.pad_id
        qwen = engram.hash_dialect == QWEN
        fill_id, restart_id = (tokens.eos_id, tokens.eos_id) if qwen else (pad_id, None)
        if tokens.canonical_vocab_size not in (0, canonical_size):
            what = f"hash dialect {QWEN!r}" if qwen else "model.engram.compression = False"
            what = f"form {SCONE!r}" if engram.form == SCONE else what
            raise UserError(
                f"config.tokenizer.canonical_vocab_size = {tokens.canonical_vocab_size}: must be 0"
                f" or tokenizer.vocab_size = {canonical_size}: {what} reads raw ids"
            )
    else:
        compression = None if tokenizer is None else build_compression(tokenizer)
        canonical_size = _canonical_size(tokens, compression, needed=bool(engram.layers))
        pad_id = _canonical_pad(tokens, compression)
        fill_id, restart_id = pad_id, None
    layers: dict[int, LayerAddressing | FgramAddressing] = {}
    if engram.form == SCONE:
        count = engram.rows_per_head[0]
        layers |= {i: FgramAddressing(i, engram.orders, count) for i in engram.layers}
    else:
        layers |= plan_layer(engram, canonical_size, fill_id=fill_id, restart_id=restart_id)
    return Addressing(
        compression=compression,
        canonical_vocab_size=canonical_size,
        pad_id=pad_id,
        layers=layers,
        dialect=engram.hash_dialect,
        eos_id=tokens.eos_id,
        tokenizer_fingerprint="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        lookup=engram.lookup,
        signs=engram.signs,
        case=build_case_classes(tokenizer) if engram.case and tokenizer is not None else None,
    )


def _canonical_size(tokens: TokenizerConfig, compression: np.ndarray | None, needed: bool) -> int:
    recorded = tokens.canonical_vocab_size
    if compression is None:
        if needed and recorded <= 0:
            raise UserError(
                f"config.tokenizer.canonical_vocab_size = {recorded}: must be the number of ids the"
                " tokenizer compresses to when no tokenizer is given"
            )
        return recorded
    found = int(compression.max()) + 1
    if recorded not in (0, found):
        raise UserError(
            f"config.tokenizer.canonical_vocab_size = {recorded} ({tokens.name}): this tokenizer"
            f" compresses to {found} canonical ids; give the one recorded, or set the key to 0"
        )
    return found


def _canonical_pad(tokens: TokenizerConfig, compression: np.ndarray | None) -> int:
    if compression is None:
        return tokens.pad_id
    if tokens.pad_id >= len(compression):
        raise UserError(
            f"config.tokenizer.pad_id = {tokens.pad_id}: must be an id of the tokenizer, 0 to"
            f" {len(compression) - 1}"
        )
    return int(compression[tokens.pad_id])
