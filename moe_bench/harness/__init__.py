"""The only package that imports torch or Megatron-Core: it builds what a recipe asks for and times it."""
