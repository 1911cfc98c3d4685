"""Storages, operations and calls of a few operators, by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import grouped_mm

from moe_bench.harness.dryrun.accounting import BLOCK_BYTES, Account, Category, bytes_by_category
from moe_bench.harness.dryrun.operator_flops import FlopKind
from moe_bench.harness.dryrun.places import Phase, Places
from moe_bench.report.dryrun_plot import COLOURS
from moe_bench.report.dryrun_view import CATEGORIES

MEBI = 2**20


@pytest.fixture
def account() -> Iterator[Account]:
    """An account in the forward phase."""
    places = Places()
    places.phase = Phase.FORWARD
    account = Account(places)
    with account.watched():
        yield account


def empty(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def test_a_storage_counts_once_in_whole_blocks_until_its_last_view_goes(account: Account) -> None:
    tensor = empty(1000)
    assert account.total_bytes == 1024
    view = tensor[:10]
    del tensor
    assert account.total_bytes == 1024
    del view
    assert account.total_bytes == 0


def test_host_tensors_are_not_counted(account: Account) -> None:
    host = torch.zeros(1000)
    assert account.total_bytes == 0
    assert len(host) == 1000


def test_in_place_operators_and_views_allocate_nothing_and_only_the_first_are_calls(account: Account) -> None:
    tensor = empty(BLOCK_BYTES)
    calls = account.num_calls[Phase.FORWARD]
    tensor.view(2, -1)
    assert account.num_calls[Phase.FORWARD] == calls
    tensor.add_(1)
    assert account.num_calls[Phase.FORWARD] == calls + 1
    assert account.total_bytes == BLOCK_BYTES


def test_the_peak_is_what_was_held_at_once_by_category(account: Account) -> None:
    with account.holding(Category.WEIGHTS):
        weights = empty(4 * MEBI)
    passing = empty(2 * MEBI)
    del passing
    kept = empty(MEBI)
    account.start_peak()
    more = empty(3 * MEBI)
    del more
    assert account.peak.num_bytes == 8 * MEBI
    assert bytes_by_category(account.peak.by_owner) == {
        Category.WEIGHTS: 4 * MEBI,
        Category.ACTIVATIONS: 4 * MEBI,
    }
    assert account.peak_bytes_by_phase == {Phase.FORWARD: 8 * MEBI}
    assert len(weights) + len(kept) == 5 * MEBI


def test_a_storage_can_be_given_another_purpose(account: Account) -> None:
    tensor = empty(MEBI)
    account.assign(tensor, Category.GRADIENTS)
    assert account.bytes_by_category == {Category.GRADIENTS: MEBI}


def test_a_storage_that_is_released_and_brought_back_in_place_is_followed(account: Account) -> None:
    tensor = empty(MEBI)
    tensor.untyped_storage().resize_(0)
    assert account.total_bytes == 0
    account.places.phase = Phase.FINALIZE
    tensor.untyped_storage().resize_(2 * MEBI)
    # what is brought back belongs to whoever brings it
    assert account.bytes_by_category == {Category.STEP: 2 * MEBI}
    del tensor
    assert account.total_bytes == 0


def test_a_number_that_the_host_reads_is_one(account: Account) -> None:
    assert torch.empty((), device="meta").item() == 1.0
    assert torch.empty((), dtype=torch.int64, device="meta").item() == 1
    assert bool(torch.empty((), dtype=torch.bool, device="meta")) is True


def test_products_are_counted_by_kind_grouped_ones_too(account: Account) -> None:
    left, right = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((32, 16), (16, 48)))
    torch.mm(left, right)
    torch.bmm(left.view(4, 8, 16), right.view(1, 16, 48).expand(4, -1, -1))
    experts = torch.empty(4, 16, 48, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    grouped_mm(left, experts, offs=ends)
    grouped_mm(left.t(), torch.empty(32, 48, dtype=torch.bfloat16, device="meta"), offs=ends)
    counted = {kind: num for (_, _, kind), num in account.flops.items()}
    assert counted == {
        FlopKind.MM: 2 * 32 * 16 * 48,
        FlopKind.BMM: 4 * 2 * 8 * 16 * 48,
        FlopKind.GROUPED: 2 * (2 * 32 * 16 * 48),
    }


def test_every_category_is_shown_and_drawn() -> None:
    assert set(CATEGORIES) == {category.value for category in Category}
    assert set(COLOURS) == set(CATEGORIES)
