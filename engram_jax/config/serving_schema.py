"""The section `serve` of the configuration: its keys and defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

DEVICE, HOST, DISK = "device", "host", "disk"
ALL_LAYERS = -1
ROW_FORMATS = ("float32", "bfloat16", "fp8")  # of stored rows (memory/store/row_format.py)
SECRETS = frozenset({"serve.api_key"})  # keys whose values no record, message or log has
HIDDEN = "<not recorded>"  # what stands for each of them


@dataclass(frozen=True)
class ServeConfig:
    """Inference: the engine's sizes, and where the tables are stored.

    sequences: decoded together.
    capacity: the most tokens of one, prompt and answer; 0 = as many as the checkpoint was last
      trained with (data.seq_len).
    accept_longer: allow more than that, with a warning; for --mode=generate, too.
    page: tokens in a page of the key-value cache.
    pages: for all sequences together; 0 = enough for `sequences` of full length; with fewer, long
      ones wait or are swapped to host memory and back.
    prefill_chunk: tokens of a prompt that are computed at a time.
    prefill_sequences: prompts that are computed at a time.
    share_prefixes: compute what prompts have in common at their beginnings once, and keep it.
    queue: the most waiting requests.
    memory: where the tables are: "device", "host" (DRAM) or "disk" (in the file).
    memory_file: written by --mode=export-memory; "" = the checkpoint's own tables.
    accept_other_memory: allow a memory_file of another checkpoint, with a warning.
    frequency_file: written by --mode=count-memory: how often each row is read.
    device_cache: share of the rows, the most frequent ones, kept on the device, too.
    host_cache: share of the rows kept in DRAM in front of the file.
    ema: use the moving average of the parameters (train.ema_decay); for --mode=evaluate and
      generate, too.
    off_layers: Engram layers that add nothing, for analysis, in --mode=evaluate and generate, too;
      (-1,) = all.
    off_orders: n-gram orders whose rows are taken as zero, likewise.
    parse_special: whether special tokens spelled in a prompt become their ids; otherwise they are
      text, as in training.
    host: the address of the HTTP server.
    port: its port; 0 = any free one.
    api_key: keys of which a request must have one (Authorization: Bearer KEY), for --mode=serve;
      () = none. No record has them. $ENGRAM_API_KEY adds one, or several with commas between.
    api_key_file: a file with more of them, one a line.
    cors_origins: origins (https://example.org) whose pages a browser may let use the server; ("*",)
      = all.
    access_log: a line on standard error for every request, without its text.
    log_level: the least serious lines that are logged: "info", "warning" or "error".
    max_body: the most bytes of a request.
    max_answer: the most tokens and log-probabilities that one answer may list.
    drain_seconds: for running requests, after SIGTERM.
    """

    sequences: int = 8
    capacity: int = 0
    accept_longer: bool = False
    page: int = 64
    pages: int = 0
    prefill_chunk: int = 128
    prefill_sequences: int = 2
    share_prefixes: bool = True
    queue: int = 256
    memory: str = DEVICE
    memory_file: str = ""
    accept_other_memory: bool = False
    frequency_file: str = ""
    device_cache: float = 0.0
    host_cache: float = 0.0
    ema: bool = False
    off_layers: tuple[int, ...] = ()
    off_orders: tuple[int, ...] = ()
    parse_special: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str = ""
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    log_level: str = "info"
    max_body: int = 1 << 20
    max_answer: int = 1 << 20
    drain_seconds: float = 30.0

    def kept_prefixes(self, pages: int) -> int:
        """How many beginnings of prompts can be kept in so many pages (serve/prefixes.py): one for
        every unit, the fewest chunks that fill whole pages."""
        if not self.share_prefixes:
            return 0
        return pages * self.page // math.lcm(self.prefill_chunk, self.page)

    def is_off(self, layer: str | int) -> bool:
        """Whether an Engram layer adds nothing."""
        return any(off in (ALL_LAYERS, int(layer)) for off in self.off_layers)
