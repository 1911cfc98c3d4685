"""moe_bench: recipes, measurements and published numbers of Mixture-of-Experts training on Megatron-Core."""

__version__ = "0.1.0"
