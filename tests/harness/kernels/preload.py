"""What the server imports before it forks the ranks of a test."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import moe_bench.harness.host_device
    import moe_bench.harness.kernels.layer_spec  # noqa: F401
