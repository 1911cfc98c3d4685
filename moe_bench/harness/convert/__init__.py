"""Tensors between Hugging Face's checkpoints and Megatron-Core's, and the proof that nothing is lost."""
