"""What is computed when, and in which pages: pure bookkeeping without tensors."""
