"""The fields of a recipe that a published row prints, by dotted name."""

from __future__ import annotations

from typing import get_args

from moe_bench.results.published import PublishedRow
from moe_bench.results.row_recipe import PRECISIONS
from moe_bench.spec.recipe import (
    CudaGraphs,
    GraphModule,
    Offload,
    OffloadModule,
    Recompute,
    RecomputeModule,
    TokenDrop,
)

LAYOUT = "parallel.layout"
"""Everything that places layers on stages; its value is a mapping of fields of `ParallelSpec`."""

_SAME = {
    "seq_len": "seq_len",
    "gbs": "global_batch_size",
    "mbs": "micro_batch_size",
    "mtp": "num_mtp_layers",
    "num_gpus": "parallel.num_gpus",
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "vpp": "parallel.virtual_pipeline",
    "cp": "parallel.context",
    "ep": "parallel.expert",
    "etp": "parallel.expert_tensor",
    "dispatcher": "dispatch.dispatcher",
    "dispatcher_sms": "dispatch.num_sms",
    "ep_overlap": "overlap.expert_parallel",
    "delay_wgrad": "overlap.delayed_wgrad",
    "tp_comm_overlap": "overlap.tensor_parallel",
}
"""Columns whose value is the field's."""
_SHARDING = {"zero1": "distributed_optimizer", "fsdp": "megatron_fsdp", "fsdp2": "megatron_fsdp"}
_PRECISIONS = {printed: ours for ours, printed in PRECISIONS.items()}


def printed_fields(row: PublishedRow) -> dict[str, object]:
    """What `row` prints, in a recipe's terms; a column that says half of a field is left to the rules.

    `FP8` alone is no precision, `selective` without modules no recomputation, graphs of Transformer Engine
    without modules no graphs, dropped tokens without a
    capacity no capacity, and a forced balance may be random or exact. Modules that no recipe knows are left
    out, and so is what a size of 1 makes impossible: virtual stages at PP1, overlap of TP at TP1.
    """
    fields: dict[str, object] = {
        field: value for column, field in _SAME.items() if (value := getattr(row, column)) is not None
    }
    if row.tp == 1:
        fields["overlap.tensor_parallel"] = False
    if row.pp == 1:
        fields["parallel.virtual_pipeline"] = 1
    if row.precision in _PRECISIONS:
        fields["precision"] = _PRECISIONS[row.precision]
    if row.sharding is not None:
        fields["parallel.data_sharding"] = _SHARDING[row.sharding]
    if row.layout is not None:
        fields[LAYOUT] = {"layout": row.layout}
    if row.force_load_balance is False:
        fields["routing.mode"] = "natural"
    return fields | _routing(row) | _memory(row) | _optimizer(row)


def _routing(row: PublishedRow) -> dict[str, object]:
    if row.token_drop is False:
        return {"token_drop": None}
    if row.capacity_factor is None:
        return {}
    return {"token_drop": TokenDrop(capacity_factor=row.capacity_factor)}


def _memory(row: PublishedRow) -> dict[str, object]:
    fields: dict[str, object] = {}
    recompute = _recompute(row)
    if recompute is not None:
        fields["recompute"] = recompute
    graphs = _cuda_graphs(row)
    if graphs is not None:
        fields["cuda_graphs"] = graphs
    if row.offload is not None or row.paged_stash is not None:
        fields["offload"] = _offload(row)
    return fields


def _recompute(row: PublishedRow) -> Recompute | None:
    if row.recompute is None or row.recompute == "selective":
        return None
    if row.recompute == "none":
        return Recompute()
    if row.recompute == "full":
        if row.recompute_num_layers is None:
            return Recompute(granularity="full", method="uniform", num_layers=1)
        return Recompute(granularity="full", method="block", num_layers=row.recompute_num_layers)
    known = tuple(module for module in get_args(RecomputeModule) if module in row.recompute)
    return Recompute(granularity="selective", modules=known) if known else Recompute()


def _cuda_graphs(row: PublishedRow) -> CudaGraphs | None:
    modules = row.cuda_graph_modules or ()
    if row.cuda_graph == "full_iteration" or (row.cuda_graph == "local" and "full_iteration" in modules):
        return CudaGraphs(implementation="full_iteration")
    known = tuple(module for module in get_args(GraphModule) if module in modules)
    if row.cuda_graph is None or (row.cuda_graph == "transformer_engine" and not modules):
        return None
    # to a recipe no module means whole layers, which is not what a list of other modules says
    if row.cuda_graph == "none" or (modules and not known):
        return CudaGraphs()
    return CudaGraphs(implementation=row.cuda_graph, modules=known)


def _offload(row: PublishedRow) -> Offload:
    modules = tuple(module for module in get_args(OffloadModule) if module in (row.offload_modules or ()))
    return Offload(
        optimizer_fraction=1.0 if row.offload == "optimizer" else 0.0,
        num_activation_layers=row.offload_num_layers or 0,
        modules=modules,
        paged_stash=row.paged_stash or False,
    )


def _optimizer(row: PublishedRow) -> dict[str, object]:
    printed = row.optimizer
    if printed is None:
        return {}
    fields: dict[str, object] = {
        "optimizer.main_params_dtype": printed.main_params,
        "optimizer.gradient_dtype": printed.main_grads,
        "optimizer.exp_avg_dtype": printed.exp_avg,
        "optimizer.exp_avg_sq_dtype": printed.exp_avg_sq,
    }
    if printed.name is not None:
        fields["optimizer.name"] = "adam" if printed.name == "adamw" else printed.name
    if printed.clip_grad is False:
        fields["optimizer.clip_grad_norm"] = 0.0
    return {field: value for field, value in fields.items() if value is not None}
