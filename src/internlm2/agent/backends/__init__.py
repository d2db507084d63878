"""What may stand behind an agent: our engine, or any endpoint that speaks OpenAI's API."""
