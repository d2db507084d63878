"""Names and files: any format to the official tensors, and back."""
