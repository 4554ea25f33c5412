"""The tiny model behind an engine, its tokenizer a token per byte; nothing is downloaded."""

from __future__ import annotations

import importlib.util

import pytest

from tests.serve.served import make_engine
from tests.serve.web import EOS, tokenizer


@pytest.fixture(scope="session", autouse=True)
def _no_network(tmp_path_factory):
    """lm-eval's data sets are local files here, prepared in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lm_eval"):
            import datasets
            from huggingface_hub import constants

            cache = tmp_path_factory.mktemp("datasets")
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="package")
def engine():
    made = make_engine(tokenizer=tokenizer(), eos_id=EOS)
    yield made
    made.close()
