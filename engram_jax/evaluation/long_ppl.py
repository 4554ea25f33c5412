"""LongPPL and plain perplexity of a checkpoint, side by side on the same texts.

A document is cut into texts of at most `context` tokens, each of which is read whole; what has no
more tokens than the truncated context has no token that could be key, and is left out of both.
LongPPL is exp of the mean loss of the key tokens (evaluation/key_tokens.py), perplexity that of all
tokens but each text's first. Which tokens are key an evaluator says: the checkpoint itself, or that
of another run, with a tokenizer of its own.

Standard errors are over documents, of one document over its texts (evaluation/text_scores.py);
those of a perplexity are the perplexity times those of the mean loss.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.addressing import load_tokenizer, tokenizer_fingerprint
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.checkpoint.results import LONG_PPL, write_result
from engram_jax.checkpoint.run_record import get_config
from engram_jax.checkpoint.run_settings import check_text
from engram_jax.checkpoint.workdir import TOKENIZER, check_trained, parse_checkpoint
from engram_jax.config import Config, parse_config
from engram_jax.config.errors import UserError, shown
from engram_jax.data.cache import key_of
from engram_jax.data.named_texts import HELD_OUT, held_out_fingerprint, read_documents
from engram_jax.distributed import processes
from engram_jax.distributed.consensus import agree, gather
from engram_jax.evaluation.held_out import perplexity
from engram_jax.evaluation.key_tokens import (
    CONTEXT,
    STRIDE,
    TRUNCATED,
    Encode,
    Encoded,
    Part,
    Rule,
    cut,
    inside,
    key_tokens,
    short_parts,
    spans_of,
)
from engram_jax.evaluation.part_scorer import PartScorer
from engram_jax.evaluation.scored_model import ScoredModel, open_scored
from engram_jax.evaluation.text_scores import ALL, of_switches, parse_texts, quotient
from engram_jax.model.program import check_decodes


@dataclass(frozen=True)
class Settings:
    """texts: NAME=PATH, or "held_out". evaluator: WORKDIR or WORKDIR@STEP, "" = the checkpoint
    itself. context, truncated, stride: tokens (`Rule`), 0 = `rule_of`'s. limit: the first so many
    texts of each name, 0 = all."""

    texts: tuple[str, ...]
    evaluator: str = ""
    context: int = 0
    truncated: int = 0
    stride: int = 0
    limit: int = 0


def rule_of(settings: Settings, seq_len: int) -> Rule:
    """The published lengths for contexts of 32,768 tokens, for others in proportion but no more
    than those; context: by default seq_len. Raises UserError where they do not fit together."""
    context = settings.context or seq_len
    share = context / CONTEXT
    truncated = settings.truncated or max(1, min(TRUNCATED, int(TRUNCATED * share)))
    stride = settings.stride or max(1, min(STRIDE, int(STRIDE * share)))
    if not truncated < context:
        raise UserError(f"--truncated={truncated}: must be less than --context={context}")
    if not truncated + stride <= context:
        raise UserError(
            f"--stride={stride}: must be at most {context - truncated}, what"
            f" --truncated={truncated} leaves of --context={context}"
        )
    return Rule(context, truncated, stride)


@dataclass(frozen=True)
class Piece:
    """A text: of which document, and its tokens for the model and for the evaluator."""

    document: int
    model: Encoded
    evaluator: Encoded


def key_spans(score: PartScorer, pieces: Sequence[Piece], rule: Rule) -> list[np.ndarray]:
    """The key text of every piece (`spans_of`), by the evaluator."""
    whole = whole_nats(score, [piece.evaluator.ids for piece in pieces])
    shorts = [short_parts(len(piece.evaluator.ids), rule) for piece in pieces]
    flat = [
        (piece.evaluator.ids, part)
        for piece, parts in zip(pieces, shorts, strict=True)
        for part in parts
    ]
    found = iter(score(flat))
    spans = []
    for piece, nats, parts in zip(pieces, whole, shorts, strict=True):
        truncated = np.concatenate(list(islice(found, len(parts))))
        key = key_tokens(nats[rule.truncated - 1 :], truncated)  # nats[i] is of token i + 1
        spans.append(spans_of(piece.evaluator.offsets[rule.truncated :][key]))
    return spans


def whole_nats(score: PartScorer, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The losses of each text's tokens but the first, float64 [n - 1]."""
    return score([(ids, Part(0, len(ids), 1)) for ids in texts])


def summary(
    documents: np.ndarray, nats: Sequence[np.ndarray], keys: Sequence[np.ndarray]
) -> dict[str, Any]:
    """LongPPL and perplexity. documents: of every text, int [texts]. nats: of its tokens but the
    first; keys: bool, which of these are key. What is of no token, or of one text, is None."""
    several = len(np.unique(documents)) > 1
    groups = documents if several else np.arange(len(nats))
    sizes = [len(each) for each in nats]
    group = np.repeat(groups, sizes) if sizes else np.zeros(0, int)
    flat = np.concatenate([np.zeros(0), *nats])
    key = np.concatenate([np.zeros(0, bool), *keys])
    long, long_error = quotient(flat[key], np.ones(int(key.sum())), group[key])
    mean, error = quotient(flat, np.ones(len(flat)), group)
    return {
        "documents": len(np.unique(documents)),
        "texts": len(nats),
        "tokens": len(flat),
        "key_tokens": int(key.sum()),
        **_exp("long_ppl", long, long_error),
        **_exp("perplexity", mean, error),
    }


def _exp(name: str, mean: float | None, error: float | None) -> dict[str, float | None]:
    if mean is None:
        return {name: None, f"{name}_stderr": None}
    found = perplexity(mean)
    return {name: found, f"{name}_stderr": None if error is None else found * error}


def evaluate_long_ppl(
    config: Config, workdir: Path, step: str, settings: Settings, accept: Sequence[str] = ()
) -> dict[str, Any]:
    """LongPPL and perplexity of a checkpoint on each of some texts, and on all together. Process 0
    also writes the result below `workdir` (checkpoint/results.py).

    Raises UserError for texts, lengths or an evaluator that cannot be used, or as `load_model`.
    """
    named = parse_texts(settings.texts)
    rule = rule_of(settings, config.data.seq_len)
    if config.model.engram.layers:
        check_decodes(config)
    tell = processes.stages(sys.stderr)  # standard output is the result
    there, by = workdir, step
    if settings.evaluator:
        there, by = parse_checkpoint(settings.evaluator, f"--evaluator={settings.evaluator}")
    own = agree(lambda: _encoder(workdir))
    its = own if there == workdir else agree(lambda: _encoder(there))
    tell("reading the texts")
    pieces, left_out = {}, {}
    for name, path in named.items():
        texts = agree(partial(_pieces, path, config, (own, its), rule, settings.limit, tell))
        pieces[name], left_out[name] = texts
        if not texts[0]:
            raise UserError(
                f"--texts: {name}: none of its {left_out[name]:,} texts has more than"
                f" --truncated={rule.truncated} tokens; give longer ones, or a shorter context"
            )
    digest = key_of([[p.model.ids.tolist() for p in found] for found in pieces.values()])
    if len(set(gather(digest))) > 1:
        raise UserError("--texts: are not the same texts on every process")
    flat = [piece for found in pieces.values() for piece in found]
    count = sum(len(piece.model.ids) for piece in flat)

    same = not settings.evaluator
    judge = open_scored(*_of_evaluator(config, there, by, same), accept if same else (), tell)
    name_of_judge, digest_of_judge = judge.loaded.name, judge.loaded.digest
    tell(f"looking for key tokens among {count:,}, with {name_of_judge}")
    scorer = PartScorer(judge, rule.context)
    spans = key_spans(scorer, flat, rule)
    if same:
        model = judge
    else:
        del scorer, judge  # the memory of one model at a time
        model = open_scored(config, workdir, step, accept, tell)
        scorer = PartScorer(model, rule.context)
    if HELD_OUT in named:
        agree(partial(_check_held_out, model, workdir, accept, tell))
    tell(f"scoring {count:,} tokens with {model.loaded.name}")
    nats = whole_nats(scorer, [piece.model.ids for piece in flat])
    keys = [inside(p.model.offsets, s)[1:] for p, s in zip(flat, spans, strict=True)]

    result: dict[str, Any] = {
        "name": config.name,
        "step": model.loaded.step,
        "evaluator": name_of_judge,
        **dataclasses.asdict(rule),
        "texts": {},
    }
    at, documents = 0, list[np.ndarray]()
    for name, found in pieces.items():
        part = slice(at, at + len(found))
        numbers = np.asarray([piece.document for piece in found])
        scored = summary(numbers, nats[part], keys[part])
        source = shown(named[name]) or "the run's held-out split"
        result["texts"][name] = {"source": source, **scored, "too_short": left_out[name]}
        documents.append(numbers + (int(documents[-1].max()) + 1 if documents else 0))
        at += len(found)
    if len(pieces) > 1:
        result[ALL] = summary(np.concatenate(documents), nats, keys)
    result |= of_switches(config)
    if jax.process_index() == 0:
        asked = {**dataclasses.asdict(rule), "evaluator": digest_of_judge, "texts": digest}
        asked |= {"names": list(named), "limit": settings.limit, **of_switches(config)}
        asked |= {"changed_settings": list(accept)} if accept else {}
        result["results"] = str(write_result(workdir, LONG_PPL, model.loaded, asked, result))
    return result


def _of_evaluator(config: Config, there: Path, step: str, same: bool) -> tuple[Config, Path, str]:
    """What opens it, on the checkpoint's mesh."""
    if same:
        return config, there, step
    found = agree(lambda: parse_config(get_config(f"{step}:{there}")))
    found = dataclasses.replace(found, mesh=config.mesh)
    if found.model.engram.layers:
        check_decodes(found)
    return found, there, step


def _check_held_out(
    model: ScoredModel, workdir: Path, accept: Sequence[str], tell: Callable[[str], None]
) -> None:
    """Raises UserError if config.data has another text than the run's."""
    loaded, config = model.loaded, model.program.config
    found = held_out_fingerprint(config, loaded.tokenizer, loaded.eos_id, tell)
    check_text(workdir, loaded.trained_on, found, accept)


def _encoder(workdir: Path) -> tuple[Encode, str]:
    """A run's tokenizer, and its fingerprint."""
    check_trained(workdir)
    tokenizer = load_tokenizer(workdir / TOKENIZER)

    def encode(text: str) -> Encoded:
        (found,) = encode_batch(tokenizer, [text], offsets=True)
        offsets = np.asarray(found.offsets, np.int64).reshape(-1, 2)
        return Encoded(np.asarray(found.ids, np.int32), offsets)

    return encode, tokenizer_fingerprint(tokenizer)


def _pieces(
    path: str,
    config: Config,
    encoders: tuple[tuple[Encode, str], tuple[Encode, str]],
    rule: Rule,
    limit: int,
    tell: Callable[[str], None],
) -> tuple[list[Piece], int]:
    """The texts of one name that are long enough, at most `limit` (0 = all), and how many are
    not."""
    (own, mine), (its, other) = encoders
    found: list[Piece] = []
    short = 0
    for number, document in enumerate(read_documents(path, config, "--texts", tell)):
        for text in cut(document, [own] if mine == other else [own, its], rule.context):
            if limit and len(found) == limit:
                return found, short
            encoded = own(text)
            piece = Piece(number, encoded, encoded if mine == other else its(text))
            if len(piece.evaluator.ids) > rule.truncated and len(encoded.ids) > 1:
                found.append(piece)
            else:
                short += 1
    return found, short


def table(result: Mapping[str, Any]) -> str:
    """The result as text for a terminal."""
    rows = {**result["texts"], **({ALL: result[ALL]} if ALL in result else {})}
    width = max(map(len, [*rows, "text"])) + 2
    head = f"{'text':{width}}{'texts':>8}{'tokens':>12}{'key tokens':>12}"
    lines = [
        f"{result['name']}, step {result['step']}; key tokens by {result['evaluator']}",
        f"context {result['context']:,}, truncated {result['truncated']:,}, stride"
        f" {result['stride']:,} tokens",
        "",
        f"{head}{'LongPPL':>20}{'perplexity':>20}",
    ]
    for name, of in rows.items():
        cells = "".join(f"{_shown(of, key):>20}" for key in ("long_ppl", "perplexity"))
        counts = f"{of['texts']:8,}{of['tokens']:12,}{of['key_tokens']:12,}"
        lines.append(f"{name:{width}}{counts}{cells}")
    if short := sum(of.get("too_short", 0) for of in rows.values()):
        lines += ["", f"{short:,} texts of {result['truncated']:,} tokens or fewer were left out"]
    return "\n".join(lines)


def _shown(of: Mapping[str, Any], key: str) -> str:
    value, error = of[key], of[f"{key}_stderr"]
    if value is None or not math.isfinite(value):
        return "-" if value is None else "inf"
    return f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")
