"""A base model with an adapter in memory: loading, draws in place, merging."""

DTYPES = ("float32", "bfloat16", "float16")  # that a model is loaded and saved in, as torch names them
