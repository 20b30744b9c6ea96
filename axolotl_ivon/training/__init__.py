"""IVON-LoRA inside a transformers or TRL Trainer."""
