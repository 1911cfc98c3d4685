"""A single word stands for a recipe's field where only one ends in it."""

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.fields import field_path, recipe_fields
from moe_bench.spec.load import UnknownNameError


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dispatcher", "dispatch.dispatcher"),
        ("dispatch.dispatcher", "dispatch.dispatcher"),
        ("global_batch_size", "global_batch_size"),
        ("top_k", "model.moe.top_k"),
        ("env.NCCL_ALGO", "env.NCCL_ALGO"),
    ],
)
def test_a_name_stands_for_a_field(name: str, path: str) -> None:
    assert field_path(name) == path


def test_a_word_that_ends_several_fields_is_refused_with_all_of_them() -> None:
    with pytest.raises(BadInputError, match=r"modules may mean .*recompute\.modules.* or .*modules"):
        field_path("modules")


def test_an_unknown_word_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dispatcher'"):
        field_path("dispacher")


def test_every_part_of_a_recipe_has_fields() -> None:
    fields = recipe_fields()
    assert len(set(fields)) == len(fields)
    assert {"seed", "parallel.expert", "model.attention.kv_lora_rank", "kernels.fusions.permute"} <= set(
        fields
    )
