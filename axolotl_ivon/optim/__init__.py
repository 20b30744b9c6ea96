"""The optimizer: IVON-LoRA on flat buffers, with one set of kernels for each kind of machine."""
