"""Memory off the chip: row addresses in, the stored bytes of those rows out.

`rows` says what a stored row is, `source` where rows come from (DRAM, a file, a cache in front of
either), `file` how a table is written and opened, `frequency` and `policy` which rows are read how
often. Nothing here runs a network; jax is imported where bytes become numbers (`RowFormat.decode`).
The compiled loops need the extra `serve`.
"""

from engram_jax.config.extras import require

require("serve", "engram_jax.memory.store")
