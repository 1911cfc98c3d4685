"""One MoE layer built, timed, taken apart, and held against other engines."""
