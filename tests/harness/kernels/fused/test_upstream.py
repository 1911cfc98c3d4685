"""The methods of Megatron-Core that are written again here, as they were when that was done."""

from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

from moe_bench.harness.patches import source_sha256

WRITTEN_AGAIN = {
    TopKRouter.routing: "064bc38e4dc616eb",
    MoEAlltoAllTokenDispatcher.dispatch_preprocess: "834c43af76fae044",
    MoEAlltoAllTokenDispatcher.dispatch_postprocess: "bf36339e0b61df9c",
    MoEAlltoAllTokenDispatcher.combine_preprocess: "4ec72efa26a79fde",
    MoEAlltoAllTokenDispatcher.combine_postprocess: "7f35976167385818",
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize: "f603d0291f4d1759",
    MoEAllGatherTokenDispatcher.dispatch_postprocess: "3bed153e595a2d06",
    MoEAllGatherTokenDispatcher.combine_preprocess: "a2ab1fbeb631a806",
}


@pytest.mark.parametrize("method", WRITTEN_AGAIN, ids=lambda method: method.__qualname__)
def test_what_is_written_again_has_not_changed(method: Callable[..., Any]) -> None:
    assert source_sha256(method)[:16] == WRITTEN_AGAIN[method]
