"""A page to explore a checkpoint: a text's way from tokens to rows, gates and the next token.

Needs the extra `serve`.
"""

from engram_jax.config.extras import require

require("serve", "engram_jax.explore")
