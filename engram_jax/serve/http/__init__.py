"""The engine over HTTP: OpenAI's completions, models, health and metrics.

Needs the extra `serve`.
"""

from engram_jax.config.extras import require

require("serve", "engram_jax.serve.http")
