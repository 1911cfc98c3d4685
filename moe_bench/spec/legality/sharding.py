"""What Megatron-FSDP excludes, where its gradients are wrong, and the variables that streams ask for."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.recipe import Recipe

_ARGUMENTS = "megatron/training/arguments.py"
_ADAPTER = "megatron/core/distributed/fsdp/mcore_fsdp_adapter.py"
_FSDP = "megatron/core/distributed/fsdp/src/megatron_fsdp"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@rule("its device mesh covers all ranks without a pipeline axis", f"{_ADAPTER}:561", f"{_ADAPTER}:490")
def fsdp_pipeline(recipe: Recipe) -> Iterator[Found]:
    if _is_fsdp(recipe) and recipe.parallel.pipeline > 1:
        yield (
            "parallel.pipeline",
            f"PP{recipe.parallel.pipeline} with megatron_fsdp",
            "write 1, or use distributed_optimizer",
        )


@rule("it knows Adam and SGD", f"{_ARGUMENTS}:1127")
def fsdp_optimizer(recipe: Recipe) -> Iterator[Found]:
    if _is_fsdp(recipe) and recipe.optimizer.name not in ("adam", "sgd"):
        yield "optimizer.name", f"{recipe.optimizer.name} with megatron_fsdp", "use adam"


@rule("it gathers MXFP8 weights into buffers of its own", f"{_ARGUMENTS}:1114")
def fsdp_reuse_grad_buffer(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if _is_fsdp(recipe) and low is not None and low.reuse_grad_buffer:
        yield "low_precision.reuse_grad_buffer", "true with megatron_fsdp", "write false"


@rule(
    "expert gradients of one replica are scaled once per micro batch: wrong, and not refused",
    f"{_FSDP}/param_and_grad_buffer.py:4751",
    f"{_FSDP}/param_and_grad_buffer.py:2706",
)
def fsdp_lone_experts(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if not _is_fsdp(recipe) or recipe.model.moe is None or parallel.fsdp_strategy == "optim":
        return
    unit = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if parallel.num_gpus % parallel.model_parallel or parallel.num_gpus % unit:
        return
    if parallel.expert_data == 1 and recipe.num_micro_batches > 1:
        yield (
            "parallel.fsdp_strategy",
            f"{parallel.fsdp_strategy}, expert DP1, {recipe.num_micro_batches} micro batches",
            "use optim, a smaller EP, or one micro batch",
        )


@rule(
    "it overlaps the collectives of what it shards, asked or not",
    f"{_FSDP}/megatron_fsdp.py:333",
    f"{_FSDP}/megatron_fsdp.py:330",
)
def fsdp_overlap(recipe: Recipe) -> Iterator[Found]:
    if not _is_fsdp(recipe):
        return
    strategy = recipe.parallel.fsdp_strategy
    if strategy != "optim" and not recipe.overlap.grad_reduce:
        yield "overlap.grad_reduce", f"false with {strategy}", "write true"
    if strategy == "optim_grads_params" and not recipe.overlap.param_gather:
        yield "overlap.param_gather", f"false with {strategy}", "write true"


@rule("the overlap schedule calls parts of a layer, which the graphs of FSDP do not know", f"{_ADAPTER}:173")
def fsdp_graphs(recipe: Recipe) -> Iterator[Found]:
    graphs = recipe.cuda_graphs.implementation
    if _is_fsdp(recipe) and recipe.overlap.expert_parallel and graphs not in ("none", "full_iteration"):
        yield (
            "cuda_graphs.implementation",
            f"{graphs} with megatron_fsdp and overlap.expert_parallel",
            "write none",
        )


@rule("one connection would serialise its gathers behind the computation", f"{_ARGUMENTS}:1143")
def fsdp_connections(recipe: Recipe) -> Iterator[Found]:
    if _is_fsdp(recipe) and recipe.env.get(CONNECTIONS) == "1":
        yield f"env.{CONNECTIONS}", "1 with megatron_fsdp", "write '8'"


@rule(
    "before Blackwell, one connection keeps tensor and context collectives ahead of the product beside them",
    f"{_ARGUMENTS}:1437",
)
def one_connection(recipe: Recipe) -> Iterator[Found]:
    gpu, parallel = recipe.system.gpu, recipe.parallel
    if gpu is None or gpu.architecture != "hopper" or (parallel.tensor == 1 and parallel.context == 1):
        return
    if _is_fsdp(recipe) or recipe.overlap.expert_parallel:
        return
    if recipe.env.get(CONNECTIONS) != "1":
        yield (
            f"env.{CONNECTIONS}",
            f"{recipe.env.get(CONNECTIONS, 'not set')} with TP{parallel.tensor} and CP{parallel.context}",
            "write '1'",
        )


@rule(
    "the fused expert MLP exists as a CuTe DSL kernel, for whole experts with their probabilities",
    "megatron/core/transformer/moe/experts.py:287",
)
def op_fuser(recipe: Recipe) -> Iterator[Found]:
    kernels = recipe.kernels
    if recipe.model.moe is None or not kernels.op_fuser:
        return
    env = recipe.env.get("NVTE_CUTEDSL_FUSED_GROUPED_MLP", "0")
    if kernels.family != "transformer_engine" or not kernels.grouped_gemm:
        yield "kernels.op_fuser", "true without Transformer Engine's grouped products", "write false"
    elif recipe.parallel.expert_tensor > 1:
        yield "kernels.op_fuser", f"true with ETP{recipe.parallel.expert_tensor}", "write false"
    elif {"expert_fc1", "moe_act"} & set(recipe.offload.modules) or recipe.dispatch.apply_probs_on_input:
        yield "kernels.op_fuser", "true with parts of the expert offloaded or scaled early", "write false"
    elif not env.isdecimal() or int(env) < 1:
        yield "env.NVTE_CUTEDSL_FUSED_GROUPED_MLP", f"{env} with kernels.op_fuser", "write '1'"


@rule(
    "the weight gradient is added inside the product by Transformer Engine, or by the experts of others",
    "megatron/core/tensor_parallel/layers.py; moe_bench/harness/kernels/fused/weight_gradient.py",
)
def accumulation_fusion(recipe: Recipe) -> Iterator[Found]:
    kernels = recipe.kernels
    if not kernels.fusions.gradient_accumulation or kernels.family == "transformer_engine":
        return
    key = "kernels.fusions.gradient_accumulation"
    if recipe.model.moe is None:
        yield key, f"true with {kernels.family}", "write false"
    elif _is_fsdp(recipe):
        yield key, f"true with {kernels.family} under megatron_fsdp", "write false"
    elif not kernels.grouped_gemm:
        yield key, f"true with {kernels.family} and experts one by one", "write false"


RULES = (
    fsdp_pipeline, fsdp_optimizer, fsdp_reuse_grad_buffer, fsdp_lone_experts, fsdp_overlap, fsdp_graphs,
    fsdp_connections, one_connection, op_fuser, accumulation_fusion,
)  # fmt: skip


def _is_fsdp(recipe: Recipe) -> bool:
    return recipe.parallel.data_sharding == "megatron_fsdp"
