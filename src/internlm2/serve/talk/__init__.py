"""Between the API and the engine: what a conversation asks for, and what an answer holds."""
