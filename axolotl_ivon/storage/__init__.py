"""Files: formats, writes that happen whole or not at all, tensors by name. Nothing here imports torch."""
