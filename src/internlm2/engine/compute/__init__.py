"""The network on a step's batch: packing, keys and values in pages, attention over them, LoRA."""
