"""How many micro batches are run, and what is scaled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_bench.harness.dryrun.places import Phase
from moe_bench.harness.dryrun.schedule import WatchedBatches, over_the_step
from moe_bench.harness.loopback import Ledger, LedgerKey, Traffic, Transfer
from moe_bench.spec.recipe import Overlap
from moe_bench.spec.steady_state import num_micro_batches_to_run
from tests.harness.dryrun.conftest import toy

PP2 = {"num_gpus": 2, "pipeline": 2}
VPP2 = {**PP2, "virtual_pipeline": 2}


@pytest.mark.parametrize(
    ("parallel", "overlap", "asked", "run"),
    [
        ({}, {}, 64, 2),
        ({}, {}, 1, 1),
        ({"num_gpus": 2, "expert": 2}, {"expert_parallel": True}, 64, 3),
        (PP2, {}, 64, 2),
        ({"num_gpus": 4, "pipeline": 4}, {}, 64, 4),
        (VPP2, {"p2p": True}, 64, 6),
        (VPP2, {"p2p": True}, 4, 4),
        ({**VPP2, "micro_batch_group_size": 4}, {"p2p": True}, 64, 12),
        (
            {"num_gpus": 2, "data_sharding": "megatron_fsdp"},
            {"grad_reduce": True, "param_gather": True},
            7,
            3,
        ),
    ],
)
def test_as_few_micro_batches_are_run_as_reach_the_steady_state(
    parallel: dict[str, object], overlap: dict[str, bool], asked: int, run: int
) -> None:
    recipe = toy("qwen3_30b_a3b", parallel=parallel, num_micro_batches=asked, overlap=Overlap(**overlap))
    assert num_micro_batches_to_run(recipe) == run


def test_what_comes_once_per_step_is_not_scaled() -> None:
    assert over_the_step(6, Phase.BACKWARD, num_run=2, num_micro_batches=10) == 30
    assert over_the_step(6, Phase.GRADIENT_SYNC, num_run=2, num_micro_batches=10) == 6


def test_what_does_not_come_with_every_micro_batch_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="forward: 7 does not divide over the 2 micro batches"):
        over_the_step(7, Phase.FORWARD, num_run=2, num_micro_batches=5)


def test_what_most_micro_batches_do_alike_is_added_for_those_left_out() -> None:
    """Three of seven: the first sends 5 bytes, the second 3, the last 4, and 1 comes after them."""
    key = LedgerKey("all_gather", "EDP", 4, Phase.PARAMETER_SYNC, "-")
    ledger = Ledger(lambda: (Phase.PARAMETER_SYNC, "-"))
    batches = WatchedBatches([{"number": torch.tensor(number)} for number in range(3)], ledger)
    for _, sent in zip(batches, (5, 3, 4), strict=True):
        ledger.record(Transfer(op="all_gather", group="EDP", group_size=4, num_bytes=sent, outputs=()))
    ledger.record(Transfer(op="all_gather", group="EDP", group_size=4, num_bytes=1, outputs=()))
    line = ledger.lines[key]
    assert batches.with_more(key, line, num_more=0) is line
    assert batches.with_more(key, line, num_more=4) == Traffic(num_calls=4 + 4, num_bytes=13 + 4 * 3)
    once = replace(key, op="all_reduce")
    assert batches.with_more(once, Traffic(num_calls=1, num_bytes=9), num_more=4).num_bytes == 9
