"""Members served by vLLM."""
