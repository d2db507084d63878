"""A tool from a typed Python function: its schema, and arguments that are held to it."""
