"""Layouts for the legality oracle: shipped recipes changed in a few places, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Iterator

from moe_bench.errors import RecipeError
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

SEED = 20261122

CHOICES: dict[str, tuple[str, ...]] = {
    "parallel.num_gpus": ("8", "16", "32", "48", "64", "96", "128", "256", "512"),
    "parallel.tensor": ("1", "2", "3", "4", "8", "16"),
    "parallel.pipeline": ("1", "2", "3", "4", "8"),
    "parallel.virtual_pipeline": ("1", "1", "2", "3", "4"),
    "parallel.layout": (
        "null",
        "Et|(tt|)*30mL",
        "Et*4|(tttt|)*14tmL",
        "Emt|(tt|)*30L",
        "Et|(tt|)*29mtt|L",
        "Et|(tt|)*15m|(tt|)*14tL",
    ),
    "parallel.context": ("1", "2", "3", "4"),
    "parallel.context_comm": ("p2p", "a2a", "allgather"),
    "parallel.expert": ("1", "2", "4", "8", "16", "24", "32", "64"),
    "parallel.expert_tensor": ("1", "1", "2", "4"),
    "parallel.sequence_parallel": ("true", "false"),
    "parallel.embedding_counts_as_layer": ("true", "false"),
    "parallel.loss_counts_as_layer": ("true", "false"),
    "parallel.num_layers_first_stage": ("0", "1", "4", "6"),
    "parallel.num_layers_last_stage": ("0", "1", "5", "6"),
    "parallel.micro_batch_group_size": ("0", "1", "3", "4", "8", "512"),
    "parallel.data_sharding": ("none", "distributed_optimizer", "megatron_fsdp"),
    "parallel.fsdp_strategy": ("optim", "optim_grads", "optim_grads_params"),
    "parallel.num_optimizer_instances": ("1", "2", "3"),
    "model.num_layers": ("4", "12", "13", "24", "61"),
    "model.tied_embeddings": ("true", "false"),
    "model.linear_bias": ("true", "false"),
    "model.rope.interleaved": ("true", "false"),
    "model.rope.scaling": ("null",),
    "model.attention.num_heads": ("12", "64", "128"),
    "model.moe": ("null",),
    "model.moe.num_experts": ("8", "24", "64", "128"),
    "model.moe.top_k": ("1", "2", "8"),
    "model.moe.shared_expert_ffn_hidden_size": ("0", "2048"),
    "model.moe.num_leading_dense_layers": ("0", "1"),
    "model.moe.router.renormalise": ("true", "false"),
    "model.moe.router.score_function": ("softmax", "sigmoid"),
    "model.moe.router.expert_bias": ("true", "false"),
    "model.moe.router.num_groups": ("null", "4", "7", "8"),
    "model.moe.router.groups_per_token": ("null", "2", "4", "16"),
    "num_mtp_layers": ("0", "1", "2"),
    "seq_len": ("4096", "4098", "4100", "8192"),
    "global_batch_size": ("64", "100", "256", "2048"),
    "micro_batch_size": ("1", "2", "3"),
    "precision": ("fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4"),
    "low_precision": (
        "null",
        "{param_gather: true}",
        "{pad_routing_map: true}",
        "{num_first_layers_bf16: 2}",
        "{param_gather: true,reuse_grad_buffer: true}",
    ),
    "system": ("h100_sxm", "h200", "gb200_nvl72", "gb300_nvl72"),
    "kernels.family": ("transformer_engine", "transformer_engine", "torch_native"),
    "kernels.grouped_gemm": ("true", "true", "false"),
    "kernels.op_fuser": ("true", "false"),
    "kernels.fusions.rope": ("true", "false"),
    "kernels.fusions.gradient_accumulation": ("true", "false"),
    "dispatch.dispatcher": ("allgather", "alltoall", "deepep", "hybridep", "ncclep"),
    "dispatch.router_dtype": ("fp32", "fp64", "null"),
    "dispatch.apply_probs_on_input": ("true", "false"),
    "token_drop": ("null", "{capacity_factor: 1.0}", "{capacity_factor: 1.0,pad_to_capacity: true}"),
    "recompute": (
        "{}",
        "{granularity: selective,modules: [moe]}",
        "{granularity: selective,modules: [moe_act,layernorm]}",
        "{granularity: selective,modules: [mla_up_proj]}",
        "{granularity: selective,modules: [shared_experts]}",
        "{granularity: full,num_layers: 1}",
        "{granularity: full}",
        "{modules: [mlp]}",
    ),
    "overlap.expert_parallel": ("true", "false"),
    "overlap.delayed_wgrad": ("true", "false"),
    "overlap.shared_experts": ("true", "false"),
    "overlap.grad_reduce": ("true", "true", "false"),
    "overlap.param_gather": ("true", "false"),
    "overlap.param_gather_with_optimizer_step": ("true", "false"),
    "overlap.align_param_gather": ("true", "false"),
    "overlap.p2p": ("true", "false"),
    "overlap.tensor_parallel": ("true", "false"),
    "cuda_graphs": (
        "{}",
        "{implementation: local,modules: [attn]}",
        "{implementation: local,modules: [moe,moe_preprocess]}",
        "{implementation: transformer_engine,modules: [attn,moe_router,moe_preprocess]}",
        "{implementation: transformer_engine,modules: [moe_preprocess]}",
        "{implementation: transformer_engine,modules: [moe]}",
        "{implementation: transformer_engine,modules: [mlp]}",
        "{implementation: transformer_engine,modules: [moe,moe_router]}",
        "{implementation: full_iteration}",
        "{implementation: full_iteration,modules: [attn]}",
    ),
    "offload": (
        "{}",
        "{optimizer_fraction: 0.5}",
        "{num_activation_layers: 2}",
        "{num_activation_layers: 99}",
        "{modules: [attn_proj]}",
        "{modules: [core_attn,attn_proj]}",
        "{modules: [expert_fc1]}",
        "{modules: [fused_group_mlp]}",
        "{paged_stash: true}",
        "{num_activation_layers: 1,modules: [moe_act]}",
        "{modules: [fused_group_mlp,moe_act]}",
    ),
    "optimizer.name": ("adam", "adam", "sgd", "muon"),
    "optimizer.gradient_dtype": ("fp32", "bf16"),
    "optimizer.exp_avg_dtype": ("fp32", "bf16", "fp8"),
    "mcore": ("{}", "{moe_expert_rank_capacity_factor: 1.5}"),
    "env.CUDA_DEVICE_MAX_CONNECTIONS": ("'1'", "'8'"),
    "env.NVTE_CPU_OFFLOAD_V1": ("'1'", "'0'"),
    "env.NCCL_GRAPH_REGISTER": ("'0'", "'1'"),
}
"""Keys that a user may set, with values that are right in one recipe and wrong in another."""


def layouts(number: int) -> Iterator[tuple[str, Recipe]]:
    """`number` recipes with the `--set` options that made them; about a third of them is legal."""
    dice = random.Random(SEED)
    loader = Loader(root=recipes_root(), rules=())
    paths, keys = recipe_paths(loader.root), list(CHOICES)
    while number:
        path = dice.choice(paths)
        wanted = dice.sample(keys, dice.choice((1, 1, 1, 2, 2, 3, 4)))
        changes = tuple(f"{key}={dice.choice(CHOICES[key])}" for key in wanted)
        try:
            recipe = loader.recipe(path, changes=changes)
        except RecipeError:  # such as an attention field of the other kind: no recipe at all
            continue
        yield f"{path.parent.name}/{path.stem} {' '.join(changes)}", recipe
        number -= 1
