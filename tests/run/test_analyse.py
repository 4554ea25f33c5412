"""--mode=analyse: a finished run's page and JSON, against what the run itself has written, its
tables and text; and what is refused."""

from __future__ import annotations

import html.parser
import json
import shutil

import numpy as np
import pytest

from engram_jax import api
from engram_jax.addressing.hash_numpy import addresses, canonicalise
from engram_jax.analysis.cka import soft_alignment
from engram_jax.data.pipeline import trained_sequences
from engram_jax.data.run_data import open_data
from tests.runs import TINY, launched, refused, small_config, small_run

WHOLE = ["--text_tokens=1000000"]


@pytest.fixture(scope="module")
def run(undisturbed, tmp_path_factory):
    """A copy of the finished run, to write to."""
    return shutil.copytree(undisturbed, tmp_path_factory.mktemp("analysed") / "run")


def analysed(workdir, *arguments):
    done = launched(f"--workdir={workdir}", "--mode=analyse", "--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def by_hand(corpus, run):
    """(layer, how often each row was read, table, data): from the run's batches, in loops."""
    data = open_data(small_config(corpus), log=lambda line: None)
    found = api.open_run(run)
    layer, compression = data.addressing.layers[1], data.addressing.compression
    sequences, numbers = trained_sequences(data.prepared, data.config, 24)
    read = np.zeros(layer.rows, int)
    for number in numbers:
        batch = sequences.batch([number])
        rows = addresses(canonicalise(batch["tokens"], compression), layer, batch["segments"])
        for row in rows[batch["segments"] > 0].reshape(-1):
            read[row] += 1
    return layer, read, np.asarray(found.state.memory["1"].rows, np.float64), data


def test_what_rows_answer_to(run, by_hand, tmp_path):
    """Nothing but rows: no network is compiled, and the page is written where it is wanted."""
    layer, read, table, _ = by_hand
    page = tmp_path / "rows.html"
    ngram = "abcd efgh"
    found = analysed(run, "--what=rows", f"--ngram={ngram}", f"--output={page}")
    assert found["page"] == str(page) and page.is_file()
    assert json.loads(page.with_suffix(".json").read_text()) == found
    assert not (run / "analysis.html").exists()
    rows = {row["row"]: row for row in found["rows"]["layers"]["1"]}
    slots = api.slots(api.open_run(run).model, ngram)[1]
    for order, mine in slots.items():
        assert all(rows[int(row)]["why"] == f"{order} tokens of --ngram" for row in mine)
    for number, row in rows.items():
        assert row["hits"] == read[number]
        assert row["norm"] == pytest.approx(np.linalg.norm(table[number]), rel=1e-5)
        assert sum(r["count"] for r in row["readers"]) <= row["hits"]
        if row["different"] <= 6:
            assert sum(r["count"] for r in row["readers"]) == row["hits"]
        for near in row["nearest"]:
            other = table[near["row"]]
            cosine = table[number] @ other / np.linalg.norm(other) / np.linalg.norm(table[number])
            assert near["cosine"] == pytest.approx(cosine, abs=1e-5)
    for i, order in enumerate(layer.orders):
        first = layer.offsets[i * layer.heads_per_order]
        size = sum(layer.head_sizes[i * layer.heads_per_order :][: layer.heads_per_order])
        most = first + int(np.argmax(read[first : first + size]))
        assert f"{order}" in rows[most]["why"]
    counted = found["rows"]["counted"]
    assert counted["all"] and counted["tokens"] * layer.heads == read.sum()


@pytest.mark.slow
def test_everything_of_a_run(run, by_hand):
    layer, read, table, data = by_hand
    found = analysed(run, *WHOLE)
    losses = json.loads((run / "losses.json").read_text())["held_out_loss"]
    store = data.prepared.store_valid

    lens = found["lens"]
    assert lens["tokens"] == sum((b["segments"] > 0).sum() for b in data.validation_batches())
    assert len(lens["models"][0]["kl"]) == 2 and abs(lens["models"][0]["kl"][-1]) < 1e-6

    sensitivity = found["sensitivity"]
    assert sensitivity["targets"] == losses["targets"]
    assert sensitivity["loss"] == pytest.approx(
        losses["nats_per_token"][data.config.name], rel=1e-5
    )
    off = launched(
        f"--workdir={run}", "--mode=evaluate", "--json", "--config.serve.off_layers=(-1,)"
    )
    without = json.loads(off.out.splitlines()[-1])["held_out_loss"]
    parts = {part["part"]: part for part in sensitivity["parts"]}
    assert sensitivity["loss"] + parts["all layers"]["rise"] == pytest.approx(without, rel=1e-5)
    assert "tasks" not in sensitivity

    usage = found["usage"]
    for order, used in usage["layers"]["1"].items():
        for j, head in enumerate(used["heads"]):
            k = layer.orders.index(int(order)) * layer.heads_per_order + j
            own = read[layer.offsets[k] : layer.offsets[k] + layer.head_sizes[k]]
            assert (head["rows"], head["touched"]) == (len(own), (own > 0).sum())
        low = layer.offsets[layer.orders.index(int(order)) * layer.heads_per_order]
        own = slice(low, low + sum(head["rows"] for head in used["heads"]))
        norms = np.linalg.norm(table[own], axis=1)
        edges = [0, 1, 2, 4, 16, 64, 256, np.inf]
        for low, high, count, mean in zip(
            edges, edges[1:], used["rows_by_band"], used["mean_norm_by_band"], strict=False
        ):
            there = (read[own] >= low) & (read[own] < high)
            assert count == there.sum()
            assert mean == (pytest.approx(norms[there].mean(), rel=1e-5) if count else None)
    for order in ("2", "3"):
        bands = [b for b in usage["loss_by_frequency"] if str(b["order"]) == order]
        assert sum(band["targets"] for band in bands) == losses["targets"]
        total = sum(b["targets"] * b["loss"] for b in bands if b["targets"])
        assert total / losses["targets"] == pytest.approx(sensitivity["loss"], rel=1e-6)

    gates = found["gates"]
    assert np.shape(gates["gates"]) == (1, gates["shown"], 2) and gates["shown"] == 16
    document = int(gates["of"].split()[-1])
    start = store.starts[document]
    text = data.prepared.tokenizer.decode(store.tokens[start : start + 16].tolist())
    assert "".join(gates["tokens"]) == text

    page = (run / "analysis.html").read_text()
    tags = Page(page).tags
    sources = [a["src"] for tag, a in tags if tag == "img"]
    assert len(sources) >= 5 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in tags)
    assert "http://" not in page and "https://" not in page
    spans = [a for tag, a in tags if tag == "span"]
    coloured = [a for a in spans if a["title"]]
    assert len(coloured) == gates["shown"] * 3  # the mean, and each of two branches
    assert json.loads((run / "analysis.json").read_text()) == found


@pytest.mark.slow
def test_two_runs_on_a_given_text(run, corpus, tmp_path):
    """Of a run and itself every layer is its own likeness; of another one alignment is stated."""
    text = tmp_path / "text.txt"
    text.write_text("of Abcd Efgh and the Ijab, " * 60)
    same = analysed(run, "--what=lens,cka", f"--text={text}", f"--against={run}")
    np.testing.assert_allclose(np.diag(same["cka"]["cka"]), 1, atol=1e-6)
    first, second = same["lens"]["models"]
    assert first["kl"] == second["kl"] and same["against"]["same_text"]
    other = tmp_path / "other"
    arguments = small_run(corpus, other, model__engram__layers="()", train__steps=3)
    assert launched(*arguments).code == 0
    found = analysed(run, "--what=cka", f"--text={text}", f"--against={other}")["cka"]
    assert (found["first"], found["second"]) == ("other", "run")
    assert found["soft_alignment"] == soft_alignment(np.asarray(found["cka"])).tolist()
    back = analysed(other, "--what=cka", f"--text={text}", f"--against={run}")["cka"]
    np.testing.assert_allclose(np.transpose(found["cka"]), back["cka"], rtol=1e-4)
    labels = tmp_path / "labels.jsonl"
    lines = [{"text": f"the abcd {i} efgh", "entities": [[4, 8]]} for i in range(30)]
    labels.write_text("\n".join(map(json.dumps, lines)))
    labelled = analysed(run, "--what=cka", f"--entities={labels}")["cka"]
    assert labelled["entity_tokens"] == 30 and labelled["of"] == str(labels)
    # A model without memory has its layers to show, and nothing else.
    everything = analysed(other)
    assert "lens" in everything and not {"usage", "gates", "rows", "sensitivity"} & set(everything)
    assert "fewer than 4 entities" in everything["left_out"]["cka"]
    done = launched(f"--workdir={other}", "--mode=analyse", "--what=usage")
    refused(done, "--what=usage: config.model.engram.layers = (): the model has no Engram layer")


@pytest.mark.slow
def test_tasks_with_parts_of_the_memory_off(corpus, tmp_path):
    workdir = tmp_path / "tasks"
    tasks = ["--config.data.tasks.names=('copying','facts')", "--config.data.tasks.share=0.5"]
    tasks += ["--config.data.tasks.frequencies=(1,2)", "--config.data.tasks.test_items=12"]
    done = launched(*small_run(corpus, workdir), *tasks, "--config.data.seq_len=64")
    assert done.code == 0, done.err
    scores = json.loads((workdir / "task_scores.json").read_text())
    found = analysed(workdir, "--what=sensitivity", "--text_tokens=500")["sensitivity"]
    parts = {task["part"]: task["groups"] for task in found["tasks"]}
    assert list(parts) == [part["part"] for part in found["parts"]]
    assert parts["all layers"] == scores["groups"]
    assert parts["layer 1"] == scores["groups"]  # the only one
    assert all(a["on"] == b["on"] for a, b in zip(parts["3-grams"], scores["groups"], strict=True))


REFUSED = [
    (["--what=depth"], "--what=depth: must be among lens, cka, sensitivity, gates, usage, rows"),
    (["--what=usage", "--text=a.txt"], "--text: only for --what=lens, cka, gates"),
    (["--what=gates", "--against=runs/b"], "--against: only for --what=lens, cka"),
    (["--what=lens", "--entities=a.jsonl"], "--entities: only for --what=cka"),
    (["--what=lens", "--ngram=a b"], "--ngram: only for --what=rows"),
    (["--output=page.pdf"], "--output=page.pdf: must end in .html"),
    (["--tokens=0"], "--tokens=0: must be at least 1"),
    (["--text_tokens=0"], "--text_tokens=0: must be at least 1"),
    (["--what=rows", "--ngram=a"], "--ngram='a': is 1 token(s), must be 2 at least"),
    (["--what=usage", "--config.serve.off_layers=(1,)"], "config.serve.off_layers = (1,): only"),
    (["--what=lens", "--text=/none/such"], "--text /none/such: No such file"),
    (["--what=cka", "--entities=/none/such"], "--entities /none/such: No such file"),
    (["--what=lens", "--against=/none/such"], "--workdir=/none/such: no trained model there"),
    (["--what=cka"], "has fewer than 4 entities"),
    (["--accept_changes=data"], "--accept_changes: only for --mode=train"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_what_makes_no_sense_is_refused(run, arguments, words):
    refused(launched(f"--workdir={run}", "--mode=analyse", *arguments), words)
    assert not (run / "analysis.html").exists() or (run / "analysis.json").exists()


def test_flags_of_other_modes(tmp_path):
    outcome = launched(TINY, f"--workdir={tmp_path}", "--mode=evaluate", "--what=lens")
    refused(outcome, "--what: only for --mode=analyse")
    refused(launched(TINY, f"--workdir={tmp_path / 'no'}", "--mode=analyse"), "no trained model")


def test_a_control_that_reads_other_sequences_is_refused(run):
    keys = "--config.model.engram.lookup=shuffled"
    outcome = launched(f"--workdir={run}", "--mode=analyse", keys)
    refused(outcome, "config.model.engram.lookup = 'shuffled'")
