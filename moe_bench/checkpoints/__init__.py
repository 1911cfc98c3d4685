"""How the tensors of a model are named and shaped in Hugging Face's checkpoints and in Megatron-Core's."""
