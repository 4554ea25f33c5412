"""The texts that several analyses read (run/analyses.py): held out, given, or counted; and what is
computed of them once."""

from __future__ import annotations

import numpy as np

from engram_jax.addressing import LayerAddressing
from engram_jax.addressing.tokenizer import encode_batch
from engram_jax.analysis.table_rows import row_norms
from engram_jax.analysis.texts import TextBatches, batches_of, hashed_layers, trained_ngrams
from engram_jax.analysis.usage import NgramCounts, hits
from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_file, read_text
from engram_jax.data.array_store import ArrayStore, array_store
from engram_jax.run.analysis_inputs import Given, Subject

TEXT_TOKENS = 32_768  # of held-out text or --text
LONGEST_TEXT = 1 << 24  # bytes of --text, which is tokenised whole


def addressed(given: Given) -> list[LayerAddressing]:
    """The Engram layers' addressing."""
    addressing = given.model.program.addressing
    assert addressing is not None
    return hashed_layers(addressing)


def counted(given: Given) -> dict[int, NgramCounts]:
    """The n-grams of the first training batches, each sequence once, by order."""
    if "ngrams" not in given.cache:
        addressing = given.model.program.addressing
        assert given.data is not None and addressing is not None
        given.tell("counting the training text's n-grams")
        step, most = given.model.loaded.step, given.settings.tokens
        found = trained_ngrams(addressing, given.data.prepared, given.data.config, step, most)
        given.cache["ngrams"] = found.counts
        given.cache["counted"] = {
            "tokens": found.tokens,
            "all": found.steps == step,
            "steps": found.steps,
        }
    return given.cache["ngrams"]


def row_hits(given: Given, layer: LayerAddressing) -> np.ndarray:
    name = f"hits/{layer.layer_id}"
    if name not in given.cache:
        given.cache[name] = hits(layer, counted(given))
    return given.cache[name]


def norms_of_rows(given: Given, layer: LayerAddressing) -> np.ndarray:
    name = f"norms/{layer.layer_id}"
    if name not in given.cache:
        program, memory = given.model.program, given.model.variables[2]
        given.cache[name] = row_norms(program, memory, layer.layer_id)
    return given.cache[name]


def subjects(given: Given) -> list[Subject]:
    return [given.model, *([given.other] if given.other else [])]


def text_of_given(given: Given) -> tuple[TextBatches, str]:
    """--text, or held-out sequences; and its name."""
    if given.settings.text is None:
        return held_out_text(given)
    config, most = given.model.program.config, given.settings.text_tokens or TEXT_TOKENS
    return batches_of(given_document(given), config, most=most), str(given.settings.text)


def held_out_text(given: Given, most: int = TEXT_TOKENS) -> tuple[TextBatches, str]:
    """Held-out sequences, of --text_tokens or else at most `most` tokens; and their name."""
    assert given.data is not None
    store, config = given.data.prepared.store_valid, given.model.program.config
    text = batches_of(store, config, most=given.settings.text_tokens or most)
    there = len(text.sequences)
    part = "" if len(text.numbers) == there else f"{len(text.numbers):,} of {there:,} sequences of "
    return text, f"{part}the held-out split"


def given_document(given: Given) -> ArrayStore:
    """--text as a document."""
    if "text" not in given.cache:
        path, loaded = given.settings.text, given.model.loaded
        assert path is not None
        with open_file(path, "--text") as file:
            if (size := file.seek(0, 2)) > LONGEST_TEXT:
                raise UserError(
                    f"--text={shown(path)}: {size:,} bytes; must be at most {LONGEST_TEXT:,}"
                )
        ids = encode_batch(loaded.tokenizer, [read_text(path, "--text")])[0].ids
        if not ids:
            raise UserError(f"--text={shown(path)}: has no token")
        vocab = given.model.program.config.tokenizer.vocab_size
        given.cache["text"] = array_store([[*ids, loaded.eos_id]], vocab)
    return given.cache["text"]
