"""What can be evaluated: our engine, and any endpoint that speaks OpenAI's API."""
