"""Does IVON-LoRA give what the paper promises? `python -m benchmarks.fidelity --help`."""
