"""The n-grams of a run's training text and the rows they read, counted while the page is open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_jax.analysis.row_readers import RowReaders
from engram_jax.analysis.texts import hashed_layers, trained_ngrams
from engram_jax.analysis.usage import NgramCounts
from engram_jax.checkpoint.load_model import LoadedModel
from engram_jax.checkpoint.run_settings import check_text
from engram_jax.config import Config
from engram_jax.config.errors import UserError
from engram_jax.data.run_data import open_data
from engram_jax.evaluation.held_out import check_scored_tokenizer

LOG = logging.getLogger(__name__)
READING, READY, MISSING = "reading", "ready", "missing"


@dataclass(frozen=True)
class Counted:
    """tokens: that were counted, of `of`. counts: of n-grams, by order. readers: by layer id."""

    tokens: int
    of: int
    counts: Mapping[int, NgramCounts]
    readers: Mapping[int, RowReaders]


def count_training_text(
    config: Config,
    workdir: Path,
    trained: LoadedModel,
    tokens: int,
    accept: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Counted:
    """What the first batches of a run's training read, about `tokens` tokens: from the cache, or
    prepared again. Raises UserError if the text is not there, or is another one."""
    data = open_data(config, tell, count_fgrams=False)
    check_scored_tokenizer(workdir, data)
    check_text(workdir, trained.trained_on, data.prepared.fingerprint, accept)
    addressing = trained.program.addressing
    assert addressing is not None
    found = trained_ngrams(addressing, data.prepared, data.config, trained.step, tokens)
    layers = hashed_layers(addressing)
    readers = {layer.layer_id: RowReaders(layer, found.counts) for layer in layers}
    return Counted(found.tokens, found.there, found.counts, readers)


class TrainingText:
    """Counted in a thread of its own. line: what became of it, for the user."""

    def __init__(self, count: Callable[[], Counted], tell: Callable[[str], None]):
        self.state, self.line = READING, "the training text is being counted"
        self.counted: Counted | None = None
        self._count, self._tell = count, tell
        self._thread = threading.Thread(target=self._run, name="training text", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            found = self.counted = self._count()
            self.line = f"counted over {found.tokens:,} of {found.of:,} training tokens"
            self.state = READY
        except (UserError, OSError) as error:
            self.state, self.line = MISSING, f"no counts of training text: {error}"
        except Exception:
            LOG.exception("the training text was not counted")
            self.state, self.line = MISSING, "no counts of training text: the log says why"
        self._tell(self.line)
