"""Text as training reads it: tokenizers, and Megatron-Core's indexed datasets built from plain files."""
