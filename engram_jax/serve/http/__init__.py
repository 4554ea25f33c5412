"""The engine over HTTP: OpenAI's completions, models, health and metrics."""
