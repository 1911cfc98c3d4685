"""Tests of the kernel family quack."""
