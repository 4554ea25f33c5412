"""The tokenizer that a run was trained with, in its workdir, for this and for other tools.

workdir/tokenizer.json         the tokenizer        workdir/text.json   its end-of-sequence id
workdir/tokenizer_config.json  how other tools (transformers' AutoTokenizer) are to read it
workdir/task_items.json        the test items of the synthetic tasks in its text, if there are any
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from engram_jax.addressing import load_tokenizer, tokenizer_fingerprint
from engram_jax.checkpoint.workdir import TASK_ITEMS, TEXT, TOKENIZER
from engram_jax.config import Config
from engram_jax.data import PreparedData
from engram_jax.hardware.storage import write_text

_TOKENIZER_CONFIG = "tokenizer_config.json"


def save_text_side(workdir: Path, prepared: PreparedData, config: Config) -> None:
    """The tokenizer as it was trained with, so that a run can be used without its data, by other
    tools too.

    Only the first process writes. A tokenizer.json that is the same one already stays.
    """
    if jax.process_index() != 0:
        return
    tokenizer, file = prepared.tokenizer, workdir / TOKENIZER
    mine = tokenizer_fingerprint(tokenizer)
    if not file.is_file() or tokenizer_fingerprint(load_tokenizer(file)) != mine:
        write_text(file, tokenizer.to_str(pretty=True))
    write_text(workdir / TEXT, json.dumps({"eos_id": prepared.eos_id}) + "\n")
    if prepared.tasks is not None:
        write_text(workdir / TASK_ITEMS, prepared.tasks.stored())
    text = json.dumps(tokenizer_config(prepared, config), indent=1, ensure_ascii=False)
    write_text(workdir / _TOKENIZER_CONFIG, text + "\n")


def tokenizer_config(prepared: PreparedData, config: Config) -> dict[str, Any]:
    """What transformers' AutoTokenizer reads beside a tokenizer.json: the same ids, and the same
    end of sequence, as in training."""
    tokenizer, pad_id = prepared.tokenizer, config.tokenizer.pad_id
    pad = tokenizer.get_added_tokens_decoder().get(pad_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(prepared.eos_id),
        "bos_token": None,  # training puts nothing before a document
        # A word that only fills gaps must not become a special token.
        "pad_token": pad.content if pad is not None and pad.special else None,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,  # special tokens that are spelled in a text are text
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.data.seq_len,
    }
