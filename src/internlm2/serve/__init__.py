"""The OpenAI-compatible HTTP API over the engine. Needs the `serve` extra."""
