"""A base model with an adapter in memory: loading, draws in place, merging."""
