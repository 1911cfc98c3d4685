"""What the harness tests share: Megatron-Core imported quietly, and a parent that forks ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_bench.harness.start import quiet_imports
from tests.harness.zygote import Zygote

with quiet_imports():
    import moe_bench.harness.measure  # noqa: F401  # so that no test meets its warnings


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that forks ranks; shared by all tests of the session."""
    zygote = Zygote()
    yield zygote
    zygote.close()
