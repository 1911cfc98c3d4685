"""Triton kernels that Megatron-Core leaves to Transformer Engine and apex, and the modules that call them."""
