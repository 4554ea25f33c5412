"""--mode=evaluate --neighbours: a finished run's losses beside ones computed anew by the token."""

from __future__ import annotations

import json
import shutil
from itertools import islice, pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.addressing import BatchAddresser
from engram_jax.checkpoint.load_model import load_model
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.neighbours import table
from tests.config.test_extras import hidden
from tests.runs import TINY, launched, refused, small_config

T, STEPS = 16, 24


@pytest.fixture(scope="module")
def run(undisturbed, tmp_path_factory) -> Path:
    """A copy of the finished run, to write to."""
    return shutil.copytree(undisturbed, tmp_path_factory.mktemp("neighbours") / "run")


@pytest.fixture(scope="module")
def model(corpus, undisturbed):
    """(data, tokens [T] -> (hidden states [n, d], log-probabilities [n, V])): one sequence."""
    config = small_config(corpus)
    data, trained = open_data(config, log=lambda line: None), load_model(config, undisturbed)
    addresser, weights = BatchAddresser(data.addressing), trained.weights

    @jax.jit
    def network(tokens, rows, segments):
        net = trained.program.model(weights.params, weights.router_bias)
        out = net(tokens, rows, np.arange(T)[None], segments)
        return out.hidden, jax.nn.log_softmax(net.logits(out.hidden))

    def of(ids):
        tokens, segments = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        found = addresser(tokens, segments)
        rows = {k: weights.rows[k][addresses] for k, addresses in found.items()}
        return [np.asarray(x[0, : len(ids)], np.float64) for x in network(tokens, rows, segments)]

    return data, of


def evaluated(run: Path, *arguments: str) -> tuple[dict, list[dict]]:
    done = launched(f"--workdir={run}", "--mode=evaluate", "--json", *arguments)
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert json.loads((run / f"neighbours_{result['neighbours']}.json").read_text()) == result
    return result, result["rows"]


def documents(store):
    """(number, tokens) of every document."""
    pairs = zip(store.starts[:-1], store.starts[1:], strict=True)
    return list(enumerate(store.tokens[a:b].astype(np.int64) for a, b in pairs))


def halves(store, losses: list[list[float]]) -> dict[str, float]:
    """Mean losses of odd documents and of even ones. losses: of every document's targets."""
    sides = {"loss": losses[1::2], "tuning_loss": losses[::2]}
    return {side: float(np.concatenate(found).mean()) for side, found in sides.items()}


def pieces(tokens, positions):
    """A sequence's documents: (tokens, how many of them are here)."""
    starts = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(starts)]


def least_and_most(squares, hit, chosen) -> tuple[float, float]:
    """p_kNN, whichever of the keys that are as far away as the last neighbour are taken.

    Documents that begin alike have equal contexts, more of them than there are neighbours.
    """
    k, temperature = chosen["neighbours"], chosen["temperature"]
    last = np.sort(squares)[k - 1]
    weights = np.exp((squares.min() - squares) / temperature)
    nearer, equal = squares < last - 2e-5, np.abs(squares - last) <= 2e-5
    taken = k - nearer.sum()
    total = weights[nearer].sum() + taken * weights[equal].mean()
    sure = weights[nearer & hit].sum()
    few = max(0, taken - (equal & ~hit).sum())
    many = min(taken, (equal & hit).sum())
    return tuple((sure + hits * weights[equal].mean()) / total for hits in (few, many))


@pytest.mark.slow
def test_knn_of_a_run(run, model):
    data, network = model
    result, (alone, mixed) = evaluated(run, "--neighbours=knn")
    with np.load(run / "held_out_documents.npz") as archive:
        nats, counts = archive["nats"], archive["targets"]
    assert alone["loss"] == pytest.approx(nats[1::2].sum() / counts[1::2].sum(), rel=1e-6)
    assert alone["tuning_loss"] == pytest.approx(nats[::2].sum() / counts[::2].sum(), rel=1e-6)
    assert (alone["targets"], alone["tuning_targets"]) == (counts[1::2].sum(), counts[::2].sum())
    assert mixed["tuning_loss"] <= alone["tuning_loss"]

    # The datastore anew, from the run's batches, each sequence once.
    pairs: dict[bytes, tuple] = {}
    for batch in islice(data.train_iterator(), STEPS):
        for row in range(len(batch["tokens"])):
            tokens, targets = batch["tokens"][row], batch["targets"][row]
            states = np.concatenate(
                [network(ids)[0] for ids in pieces(tokens, batch["positions"][row])]
            )
            real = batch["loss_mask"][row] > 0
            pairs[tokens.tobytes()] = states[real], targets[real]
    keys, values = (np.concatenate(x) for x in zip(*pairs.values(), strict=True))
    chosen = result["settings"]
    assert chosen["datastore_tokens"] == len(keys)
    assert mixed["bytes"] == 4 * len(keys) * (keys.shape[1] + 1)

    # Every held-out target, in the sequences of the held-out split.
    store = data.prepared.store_valid
    losses: list[list[float]] = [[] for _ in range(store.documents)]
    for batch in data.validation_batches():
        for row in range(len(batch["tokens"])):
            tokens, mask = batch["tokens"][row], batch["segments"][row] > 0
            states, logs = [], []
            for ids in pieces(tokens[mask], batch["positions"][row][mask]) if mask.any() else []:
                found = network(ids)
                states += list(found[0])
                logs += list(found[1])
            for t in np.flatnonzero(batch["loss_mask"][row]):
                target = batch["targets"][row][t]
                squares = ((keys - states[t]) ** 2).sum(axis=1)
                p = np.asarray(least_and_most(squares, values == target, chosen))
                w = chosen["weight"]
                seen = sum(len(x) for x in losses)
                document = np.searchsorted(np.cumsum(counts), seen, side="right")
                losses[document].append(-np.log(w * p + (1 - w) * np.exp(logs[t][target])))
    for side, chosen_half in (("loss", losses[1::2]), ("tuning_loss", losses[::2])):
        most, least = np.concatenate([x for x in chosen_half if x]).mean(axis=0)
        assert least * (1 - 1e-4) <= mixed[side] <= most * (1 + 1e-4)
        assert most - least < 0.01 * (alone[side] - mixed[side])


def test_a_datastore_of_the_first_tokens(run):
    result, rows = evaluated(run, "--neighbours=knn", "--knn_tokens=100", "--neighbours_text=all")
    assert result["settings"]["datastore_tokens"] == 100
    assert rows[1]["bytes"] == 100 * 4 * 17


def test_rag_of_a_run(run, model):
    """Without a passage the losses are the model's own on the text before the target."""
    data, network = model
    result, rows = evaluated(run, "--neighbours=rag", "--rag_chunk=5", "--rag_passage=6")
    full, short, found, random = rows
    assert [
        result["settings"][k] for k in ("chunk_tokens", "passage_tokens", "context_tokens")
    ] == [5, 6, 6]
    store = data.prepared.store_valid
    for row, context in ((full, 12), (short, 6)):
        losses = []
        for _, tokens in documents(store):
            losses.append([])
            for start in range(0, len(tokens), 5):
                text = tokens[max(0, start - context) : start + 5]
                logs = network(text[:-1])[1] if len(text) > 1 else []
                wanted = len(tokens[start : start + 5]) - (start == 0)
                places = range(len(text) - 1 - wanted, len(text) - 1)
                losses[-1] += [-logs[t][text[t + 1]] for t in places]
        expected = halves(store, losses)
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["tuning_loss"] == pytest.approx(expected["tuning_loss"], rel=1e-5)
    assert len({row["loss"] for row in rows}) == 4
    assert full["bytes"] == short["bytes"] == 0 < found["bytes"] == random["bytes"]
    assert result["settings"]["chunks_without_passage"] >= store.documents
    shown = table(result)
    for words in ("with a passage by BM25", "short context alone", "ms per token", "query_tokens"):
        assert words in shown
    assert f"{found['loss']:.4f}" in shown and f"{random['tuning_loss']:.4f}" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=train", "--neighbours=knn"], "--neighbours: only for --mode=evaluate"),
        (["--mode=describe", "--rag_chunk=3"], "--rag_chunk: only for --mode=evaluate"),
        (["--mode=evaluate", "--knn_tokens=3"], "--knn_tokens: only with --neighbours=knn"),
        (
            ["--mode=evaluate", "--neighbours=knn", "--rag_chunk=3"],
            "--rag_chunk: only with --neighbours=rag",
        ),
        (["--mode=evaluate", "--neighbours_text=all"], "--neighbours_text: only with --neighbours"),
        (["--mode=evaluate", "--neighbours=bm25"], "neighbours"),
        (["--mode=evaluate", "--neighbours=knn", "--knn_tokens=-1"], "knn_tokens"),
        (
            ["--mode=evaluate", "--neighbours=knn", "--accept_changes=data"],
            "--neighbours: takes the run as it is",
        ),
        (
            ["--mode=evaluate", "--neighbours=knn", "--tasks"],
            "--tasks: not with --neighbours=knn",
        ),
        (
            ["--mode=evaluate", "--neighbours=rag", "--rag_passage=300"],
            "--rag_passage=300: together at most data.seq_len",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, arguments, words):
    refused(launched(TINY, f"--workdir={tmp_path / 'run'}", *arguments), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["faiss", "bm25s"])
def test_without_the_extra(tmp_path, package):
    with hidden(package):
        done = launched(TINY, f"--workdir={tmp_path}", "--mode=evaluate", "--neighbours=knn")
    refused(done, "--neighbours=knn: needs the extra 'lab'", f"{package} is not installed")


@pytest.mark.slow
def test_chunks_of_one_token(run):
    """The first token of a document is a chunk without a target."""
    _, rows = evaluated(run, "--neighbours=rag", "--rag_chunk=1", "--rag_passage=4")
    plain = json.loads((run / "losses.json").read_text())["held_out_loss"]
    assert sum(rows[0][name] for name in ("targets", "tuning_targets")) == plain["targets"]
