"""Losses on named texts, in nats per token and in bits per byte of the text.

A text is read as the held-out split is: documents packed one behind the other and cut into
sequences, neither attention nor n-grams across a document's beginning or a cut. A document's first
token is not predicted, its end is.

    bits per byte = nats of the predicted tokens of text / ln 2 / bytes that they stand for

Bytes are the raw text's UTF-8, found by the characters that the tokenizer says a token was made of
(data/token_store.py: bytes_of_tokens), never by decoding tokens: pieces of an emoji, unknown tokens
and normalised text count as what was written. Neither the bytes nor the loss of a first token are
in the quotient. Ends are no text: their loss is told by itself, and with it in the numerator
(bits_per_byte_with_ends).

Standard errors are of documents drawn anew: of a quotient of sums over n documents, the square root
of n / (n - 1) times the sum of the squares of (numerator - quotient x denominator), divided by the
sum of the denominators (the delta method).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.checkpoint.results import TEXTS, write_result
from engram_jax.checkpoint.run_settings import check_text
from engram_jax.config import Config
from engram_jax.config.errors import UserError, shown
from engram_jax.config.named_paths import NAMED, NamedPath, named_path
from engram_jax.data.named_texts import HELD_OUT, ReadText, read_held_out, read_text
from engram_jax.data.run_data import RunData
from engram_jax.data.token_store import TokenStore
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree, gather
from engram_jax.evaluation.held_out import Evaluator, check_held_out, perplexity
from engram_jax.evaluation.scored_model import ScoredModel, open_scored
from engram_jax.evaluation.target_losses import documents_of, target_positions

ALL = "all"


@dataclass(frozen=True)
class TextTargets:
    """The predicted tokens of a text, in order; all arrays [targets].

    sizes: int64, bytes that each stands for. ends: bool, which end a document. contexts: int64, how
    many tokens before each are read to predict it. documents: int32, which document.
    """

    sizes: np.ndarray
    ends: np.ndarray
    contexts: np.ndarray
    documents: np.ndarray


def targets_of(store: TokenStore, seq_len: int, count: int | None = None) -> TextTargets:
    """The targets of a text in sequences of `seq_len` tokens; count: the first so many, None =
    all."""
    positions = target_positions(store)[:count]
    documents = documents_of(store, positions)
    # Sequence i predicts token i T + t + 1 at position t (data/packing.py).
    in_sequence = (positions - 1) % seq_len + 1
    return TextTargets(
        store.token_bytes[positions].astype(np.int64),
        positions == store.starts[documents + 1] - 1,
        np.minimum(in_sequence, positions - store.starts[documents]),
        documents,
    )


def scores(targets: TextTargets, nats: np.ndarray) -> dict[str, Any]:
    """The losses of a text's predicted tokens; nats: float64 [targets].

    nats_per_token, perplexity: over all of them, ends included, as held_out_loss is. tokens, ends:
    how many are text and how many are ends; bytes: of text that is predicted. bits_per_byte: of the
    text; with its _stderr, None for one document. What has no target is None.
    """
    text, ends = ~targets.ends, targets.ends
    bits, size = nats / math.log(2), int(targets.sizes[text].sum())
    per_byte, error = quotient(bits[text], targets.sizes[text], targets.documents[text])
    loss, loss_error = quotient(nats, np.ones(len(nats)), targets.documents)
    return {
        "tokens": int(text.sum()),
        "ends": int(ends.sum()),
        "documents": len(np.unique(targets.documents)),
        "bytes": size,
        "nats_per_token": loss,
        "nats_per_token_stderr": loss_error,
        "perplexity": None if loss is None else perplexity(loss),
        "bits_per_byte": per_byte,
        "bits_per_byte_stderr": error,
        "bits_per_byte_with_ends": float(bits.sum() / size) if size else None,
        "nats_per_end": float(nats[ends].mean()) if ends.any() else None,
    }


def by_position(targets: TextTargets, nats: np.ndarray) -> list[dict[str, Any]]:
    """The losses of the text's tokens by how much context they have: 1 token, 2 to 3, 4 to 7 and so
    on; ends are left out. A bucket without a token is left out."""
    found = []
    exponents = np.log2(targets.contexts).astype(np.int64)  # exact below 2^48
    for exponent in range(int(exponents.max(initial=0)) + 1):
        chosen = (exponents == exponent) & ~targets.ends
        size = int(targets.sizes[chosen].sum())
        if not chosen.any():
            continue
        last = min(2 ** (exponent + 1) - 1, int(targets.contexts.max()))
        found.append(
            {
                "context": [2**exponent, last],
                "tokens": int(chosen.sum()),
                "bytes": size,
                "nats_per_token": float(nats[chosen].mean()),
                "bits_per_byte": float(nats[chosen].sum() / math.log(2) / size) if size else None,
            }
        )
    return found


def joined(parts: Sequence[tuple[TextTargets, np.ndarray]]) -> tuple[TextTargets, np.ndarray]:
    """Several texts as one, their documents counted on."""
    documents, first = [], 0
    for targets, _ in parts:
        documents.append(targets.documents + first)
        first += int(targets.documents.max(initial=-1)) + 1
    together = TextTargets(
        np.concatenate([t.sizes for t, _ in parts]),
        np.concatenate([t.ends for t, _ in parts]),
        np.concatenate([t.contexts for t, _ in parts]),
        np.concatenate(documents),
    )
    return together, np.concatenate([nats for _, nats in parts])


def quotient(
    numerators: np.ndarray, denominators: np.ndarray, documents: np.ndarray
) -> tuple[float | None, float | None]:
    """(sum / sum, its standard error over documents); None for what is not defined. All arrays
    [n], documents: which one each is of."""
    whole = float(denominators.sum())
    if not whole:
        return None, None
    _, number = np.unique(documents, return_inverse=True)
    above, below = np.bincount(number, numerators), np.bincount(number, denominators)
    found, n = float(above.sum() / whole), len(below)
    if n < 2:
        return found, None
    spread = float(((above - found * below) ** 2).sum())
    return found, math.sqrt(n / (n - 1) * spread) / whole


def evaluate_texts(
    config: Config, workdir: Path, step: str, given: Sequence[str], accept: Sequence[str] = ()
) -> dict[str, Any]:
    """The losses of a checkpoint on texts, each by itself, by context, and all together.

    given: NAME=PATH of a file or folder, or HELD_OUT, the run's own split. accept: as in
    `load_model`. Process 0 also writes the result below `workdir` (checkpoint/results.py).

    Raises UserError for a text that is not there, or has no token to predict.
    """
    named = parse_texts(given)
    tell = processes.stages(sys.stderr)  # standard output is the result
    model = open_scored(config, workdir, step, accept, tell)
    texts = {}
    for name, path in named.items():
        tell(f"reading {name}")
        texts[name] = _read(name, path, model, workdir, accept, tell)
    parts = {}
    evaluator: Evaluator | None = None
    for name, text in texts.items():
        data = model.data_of(text.store)
        agree(partial(check_targets, name, data))
        evaluator = (
            Evaluator(model.program, data, config.serve)
            if evaluator is None
            else evaluator.over(data)
        )
        tell(f"scoring {name}: {len(text.store):,} tokens")
        nats = evaluator.target_nats(model)
        parts[name] = targets_of(text.store, config.data.seq_len), nats
    result = {
        "name": config.name,
        "step": model.loaded.step,
        "seq_len": config.data.seq_len,
        "texts": {
            name: {
                "source": texts[name].source,
                "digest": texts[name].digest,
                **scores(*part),
                "by_position": by_position(*part),
            }
            for name, part in parts.items()
        },
    }
    if len(parts) > 1:
        whole = joined(list(parts.values()))
        result[ALL] = {**scores(*whole), "by_position": by_position(*whole)}
    result |= of_switches(config)
    if jax.process_index() == 0:
        of_texts = {name: text.digest for name, text in texts.items()}
        asked = {"texts": of_texts, **of_switches(config)}
        if accept:
            asked |= {"changed_settings": list(accept), "seq_len": config.data.seq_len}
        result["results"] = str(write_result(workdir, TEXTS, model.loaded, asked, result))
    return result


def of_switches(config: Config) -> dict[str, Any]:
    """What of config.serve makes the scored model another one than the checkpoint's: {} if none."""
    serve = config.serve
    found: dict[str, Any] = {"ema_decay": config.train.ema_decay} if serve.ema else {}
    off = {key: list(getattr(serve, key)) for key in ("off_layers", "off_orders")}
    return found | {key: values for key, values in off.items() if values}


def parse_texts(given: Sequence[str], where: str = "--texts") -> dict[str, str]:
    """Name -> path, HELD_OUT -> "". Raises UserError for none, or for a name that is there
    twice."""
    named: dict[str, str] = {}
    for text in given:
        found = NamedPath(HELD_OUT, "") if text == HELD_OUT else named_path(text)
        if found is None:
            raise UserError(f"{where}={shown(text)}: must be {NAMED}; or {HELD_OUT}")
        if found.name in named or found.name == ALL or (found.name == HELD_OUT and found.path):
            raise UserError(
                f"{where}={shown(text)}: the name {found.name} stands for another text; give a"
                " different one"
            )
        named[found.name] = found.path
    if not named:
        raise UserError(f"{where}: has no value; NAME=PATH,NAME=PATH or {HELD_OUT}")
    return named


def _read(
    name: str,
    path: str,
    model: ScoredModel,
    workdir: Path,
    accept: Sequence[str],
    tell: Callable[[str], None],
) -> ReadText:
    config, loaded = model.program.config, model.loaded
    how = config, loaded.tokenizer, loaded.eos_id

    def read() -> ReadText:
        if path:
            return read_text(name, path, *how, "--texts", tell)
        found, fingerprint = read_held_out(*how, tell)
        check_text(workdir, loaded.trained_on, fingerprint, accept)
        return found

    return read_alike(read, name)


def read_alike(read: Callable[[], ReadText], name: str) -> ReadText:
    """`read()` on every process, the first before the others. Raises UserError unless all of them
    have read the same."""
    first = agree(lambda: read() if jax.process_index() == 0 else None)
    text = agree(lambda: first or read())
    digests = gather(text.digest)
    if len(set(digests)) > 1:
        raise UserError(f"{name}: is not the same text on every process")
    return text


def check_targets(name: str, data: RunData, batches: int | None = None) -> None:
    """Raises UserError unless the first `batches` batches (None: all) of a named text have a token
    to predict."""
    try:
        check_held_out(data, batches)
    except UserError as error:
        where = "" if batches is None else f" in its first {batches} batches"
        raise UserError(f"{name}: has no token to predict{where}") from error


def table(result: Mapping[str, Any]) -> str:
    """The result as text for a terminal."""
    rows = {**result["texts"], **({ALL: result[ALL]} if ALL in result else {})}
    width = max(map(len, [*rows, "text"])) + 2
    head = (
        f"{'text':{width}}{'documents':>10}{'tokens':>12}{'bytes':>13}{'nats/token':>12}"
        f"{'bits/byte':>11}{'+-':>8}{'with ends':>11}"
    )
    lines = [f"{result['name']}, step {result['step']}", "", head]
    for name, of in rows.items():
        cells = [f"{of['nats_per_token']:12.4f}"]
        for key, digits in (
            ("bits_per_byte", 11),
            ("bits_per_byte_stderr", 8),
            ("bits_per_byte_with_ends", 11),
        ):
            cells.append(f"{'-' if of[key] is None else f'{of[key]:.4f}':>{digits}}")
        lines.append(
            f"{name:{width}}{of['documents']:10,}{of['tokens']:12,}{of['bytes']:13,}{''.join(cells)}"
        )
    for name, of in rows.items():
        lines += ["", f"{name}: bits per byte by tokens of context"]
        for bucket in of["by_position"]:
            first, last = bucket["context"]
            span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
            found = bucket["bits_per_byte"]
            value = "-" if found is None else f"{found:.4f}"
            lines.append(f"  {span:>18}  {value:>8}  over {bucket['tokens']:,} tokens")
    lines += ["", "ends of documents are in nats/token and in `with ends`, not in bits/byte"]
    return "\n".join(lines)
