"""Who provides Megatron-Core's kernels: Transformer Engine where installed, or torch alone."""
