"""Experts on quack-kernels: products that gather rows and activate in epilogues (arXiv:2512.14080)."""
