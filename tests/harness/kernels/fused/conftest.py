"""Where a kernel test runs: on a GPU, or where Triton interprets (test_under_the_interpreter)."""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_GPU = pytest.mark.gpu("Triton compiles for GPUs; here its interpreter runs the kernels")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=ON_A_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are: on the host for the interpreter, or on the GPU."""
    return "cpu" if request.param == "interpreter" else "cuda"


@pytest.fixture(params=["interpreter"])
def host() -> str:
    """For tests of several processes, which need no GPU to say that two ways agree."""
    return "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what the interpreter runs to its process: Triton reads the switch when it is imported."""
    wanted, others = [], []
    for item in items:
        is_for_interpreter = "interpreter" in getattr(getattr(item, "callspec", None), "id", "")
        (others if is_for_interpreter and not IS_INTERPRETED else wanted).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = wanted
