"""Tables off the device, in host memory or in a file: reads stored rows by address.

`row_format` defines a stored row, `row_source` what every tier offers (`dram`, `file_table`,
`host_cache` in front of either), `write_file` and `memory_file` write and open files, `read_counts`
and `cache_policies` say which rows are worth caching. Nothing here runs a network; jax is imported
only where bytes are decoded to numbers (`RowFormat.decode`). The compiled loops need the extra
`serve`.
"""

from engram_jax.config.extras import require

require("serve", "engram_jax.memory.store")
