"""The experts' checkpoint against SequentialMLP's: same keys, same global tensors, same numbers."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.experts import GroupedExperts
from moe_bench.harness.kernels.provider import KernelChoice, TorchNativeSpecProvider
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.ranks import Groups

OFFSETS = ((0, 1, 3),)
"""The second of three layers."""


def shards_of(module: Any) -> list[Any]:
    """Every ShardedTensor of a module, factories built; what is no tensor (empty extra state) is left out."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    sharded = module.sharded_state_dict("mlp.experts.", OFFSETS)
    shards = []
    for entry in sharded.values():
        shards += entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    return [shard for shard in shards if isinstance(shard, ShardedTensor)]


def written(module: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the module would write: each global tensor, and how often each element of it is written."""
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for shard in shards_of(module):
        whole, count = tensors.setdefault(
            shard.key, (torch.zeros(shard.global_shape), torch.zeros(shard.global_shape))
        )
        lengths = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        part = tuple(
            slice(offset, offset + length)
            for offset, length in zip(shard.global_offset, lengths, strict=True)
        )
        whole[part] = shard.data.detach().view(lengths)
        count[part] += 1
    return tensors


def both_kinds(
    groups: Groups, changes: dict[str, Any], are_apart: bool
) -> list[tuple[bool, bool, tuple[int, ...]]]:
    """Per key: whether numbers and written places agree, and the global shape."""
    config = small_config(num_moe_experts=4, **changes)
    num_local = 4 // groups.ep.size()
    grouped = GroupedExperts(num_local, config, pg_collection=groups, are_apart=are_apart)
    provider = TorchNativeSpecProvider(KernelChoice(family="torch_native", device_type="cpu"))
    sequential = provider.grouped_mlp_modules(False)(num_local, config, pg_collection=groups)
    for parameter in grouped.parameters():
        parameter.data.normal_()
    for expert, module in enumerate(sequential.local_experts):
        for name, parameter in module.named_parameters():
            mine = grouped.get_parameter(f"{name}{expert}" if are_apart else name).data
            parameter.data.copy_(mine if are_apart else mine[expert])
    ours, theirs = written(grouped), written(sequential)
    assert ours.keys() == theirs.keys()
    return [
        (
            torch.equal(ours[key][0], theirs[key][0]),
            torch.equal(ours[key][1], theirs[key][1]),
            tuple(ours[key][0].shape),
        )
        for key in ours
    ]


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({"expert_model_parallel_size": 2}, 2),
        ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, 2),
    ],
    ids=["one rank", "experts spread", "experts cut"],
)
@pytest.mark.parametrize("are_apart", [False, True], ids=["stacked", "apart"])
def test_the_checkpoint_is_that_of_one_module_per_expert(
    are_apart: bool, sizes: dict[str, int], world_size: int, run_ranks: Any
) -> None:
    changes = sizes | ({"sequence_parallel": True} if "tensor_model_parallel_size" in sizes else {})
    for rank in run_ranks(both_kinds, world_size, sizes, changes, are_apart):
        assert rank == [(True, True, (3, 4, 64, 64)), (True, True, (3, 4, 64, 32))]


@pytest.mark.parametrize("are_apart", [False, True], ids=["stacked", "apart"])
def test_biases_are_in_the_checkpoint(are_apart: bool, groups: Groups) -> None:
    config = small_config(num_moe_experts=4, **gpt_oss_experts())
    module = GroupedExperts(4, config, pg_collection=groups, are_apart=are_apart)
    shapes = {shard.key: shard.global_shape for shard in shards_of(module)}
    assert shapes == {
        "mlp.experts.experts.linear_fc1.weight": (3, 4, 64, 64),
        "mlp.experts.experts.linear_fc1.bias": (3, 4, 64),
        "mlp.experts.experts.linear_fc2.weight": (3, 4, 64, 32),
        "mlp.experts.experts.linear_fc2.bias": (3, 4, 64),
    }


def test_a_shard_holds_the_parameter_itself(groups: Groups) -> None:
    """The distributed optimizer finds a parameter's place in the checkpoint by identity."""
    module = GroupedExperts(4, small_config(num_moe_experts=4), pg_collection=groups)
    sharded = module.sharded_state_dict("")
    assert sharded["linear_fc1.weight"].data is module.linear_fc1.weight
    assert set(sharded) == set(module.state_dict())


def test_experts_of_their_own_are_numbered_as_megatron_fsdp_numbers_them(groups: Groups) -> None:
    from megatron.core.transformer.fsdp_dtensor_checkpoint import get_expert_index_from_key

    module = GroupedExperts(4, small_config(num_moe_experts=4), pg_collection=groups, are_apart=True)
    names = [f"decoder.layers.0.mlp.experts.{name}" for name in module.state_dict()]
    assert [get_expert_index_from_key(name) for name in names] == [0, 1, 2, 3] * 2
    assert set(module.sharded_state_dict("")) == set(module.state_dict())


def test_halves_that_were_split_are_merged_again(run_ranks: Any) -> None:
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    assert run_ranks(split_and_merged, 2, sizes) == [True, True]


def split_and_merged(groups: Groups) -> bool:
    config = small_config(
        num_moe_experts=4, tensor_model_parallel_size=2, expert_tensor_parallel_size=2, sequence_parallel=True
    )
    module = GroupedExperts(4, config, pg_collection=groups)
    factory = module.sharded_state_dict("")["linear_fc1.weight"]
    merged = factory.merge_fn([shard.data for shard in factory.build()])
    return torch.equal(merged, module.linear_fc1.weight)


def test_one_tensor_per_expert_is_refused(groups: Groups) -> None:
    module = GroupedExperts(4, small_config(num_moe_experts=4), pg_collection=groups)
    with pytest.raises(MissingRequirementError, match="singleton_local_shards"):
        module.sharded_state_dict("", metadata={"singleton_local_shards": True})
