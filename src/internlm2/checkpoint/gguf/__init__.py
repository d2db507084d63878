"""GGUF files: read, written, and the tokenizer inside."""
