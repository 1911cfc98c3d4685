"""Everything a recipe's step consists of, priced: layers, pipeline, data-parallel traffic, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.collectives import Collective, Group, Phase
from moe_bench.analysis.memory import STATE_BYTES
from moe_bench.analysis.params import rank_params
from moe_bench.analysis.state_comms import gradient_bytes, state_calls
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.fabric import Fabric, LinkTime
from moe_bench.projection.host_link import HostTraffic, host_traffic
from moe_bench.projection.pricing import LayerSetting, PricedLayer, Pricer
from moe_bench.projection.schedule.choice import overlaps_experts, schedule_kind
from moe_bench.projection.schedule.placement import placed
from moe_bench.projection.schedule.shape import ScheduleKind
from moe_bench.projection.work.load import recipe_load
from moe_bench.projection.work.lowering import Lowered, lower
from moe_bench.projection.work.traits import MEGATRON, Traits
from moe_bench.spec.recipe import Recipe

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncWork:
    """Collectives of gradients or parameters on the rank that has most layers, one after the other."""

    times: tuple[LinkTime, ...]
    num_buckets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One recipe's step at reference rates."""

    lowered: Lowered
    schedule: ScheduleKind
    layers: tuple[tuple[PricedLayer, LayerSetting], ...]
    """Kinds of layers in the order of `lowered.kinds`, the loss last."""
    chunk_counts: tuple[Mapping[int, int], ...]
    """Per model chunk, how often each of `layers` occurs."""
    transfer: LinkTime
    """Hidden states sent to the next stage, per micro batch and chunk."""
    gradients: SyncWork
    parameters: SyncWork
    micro_batch_gathers: SyncWork
    """What Megatron-FSDP gathers and reduces in every micro batch."""
    offload: HostTraffic
    scaling_s: float
    """What delayed scaling reduces over all ranks of a stage, in a whole step."""
    optimizer_memory_s: float
    """Bytes of the optimizer step over the datasheet's bandwidth."""
    num_flushes: int = 1
    """As in `Traits`."""

    @property
    def recipe(self) -> Recipe:
        """The recipe it is."""
        return self.lowered.recipe

    @property
    def overlaps_experts(self) -> bool:
        """Whether dispatch and combine run beside another micro batch."""
        return overlaps_experts(self.recipe, self.schedule)


def step_work(
    recipe: Recipe,
    efficiency: Efficiency | None = None,
    *,
    load: float | None = None,
    traits: Traits = MEGATRON,
    schedule: ScheduleKind | None = None,
) -> StepWork:
    """`recipe` lowered and priced; `load` as in `lowering.lower`, None for what its routing mode leads to.

    `schedule` is the pipeline schedule in the place of Megatron-Core's. Raises BadInputError for a precision
    or a GPU that has no rates, ScheduleError for a schedule that the recipe's pipeline cannot have.
    """
    kind = schedule_kind(recipe) if schedule is None else schedule
    efficiency = Efficiency(recipe.system) if efficiency is None else efficiency
    if schedule is not None:
        recipe = placed(recipe, schedule)
    lowered = lower(recipe, load=recipe_load(recipe) if load is None else load, traits=traits)
    fabric = Fabric(recipe.system, recipe.parallel)
    pricer = Pricer(efficiency, fabric, traits)
    setting = layer_setting(recipe, kind)
    kinds = list(lowered.kinds)
    loss = len(kinds)
    works = [*lowered.kinds.values(), lowered.loss]
    counts = tuple(
        {kinds.index(kind): number for kind, number in chunk.layers.items()}
        | ({loss: 1} if chunk.has_loss else {})
        for chunk in lowered.chunks
    )
    synced = _syncs(recipe, fabric, traits)
    return StepWork(
        lowered=lowered,
        schedule=kind,
        layers=tuple((pricer.price(work), setting) for work in works),
        chunk_counts=counts,
        transfer=_transfer(recipe, fabric),
        gradients=synced[Phase.GRADIENT_SYNC],
        parameters=synced[Phase.PARAMETER_SYNC],
        micro_batch_gathers=synced[Phase.FORWARD],
        offload=host_traffic(recipe, traits),
        scaling_s=num_scale_reductions(recipe) * fabric.stage_reduction_s,
        optimizer_memory_s=optimizer_bytes(recipe) / efficiency_bandwidth(recipe),
        num_flushes=traits.num_flushes,
    )


def num_scale_reductions(recipe: Recipe) -> int:
    """Times per step that a rank waits until the largest values of its tensors are known on all ranks of its
    stage: with delayed scaling, behind every forward and every backward pass of a chunk.

    Transformer Engine reduces them on the computing stream when it leaves an FP8 region and in the first
    backward pass of one (pytorch/fp8.py at v1.11, reduce_and_update_fp8_tensors); a region is a chunk
    (Megatron-Core 0.9, transformer_block.py), and the group tensor, context and data parallel together
    (parallel_state.py, get_amax_reduction_group).
    """
    if recipe.precision != "fp8_delayed" or recipe.mcore.get("tp_only_amax_red"):
        return 0
    return 2 * recipe.num_micro_batches * recipe.parallel.virtual_pipeline


def layer_setting(recipe: Recipe, schedule: ScheduleKind) -> LayerSetting:
    """What of `recipe` and its schedule changes the time of every layer."""
    return LayerSetting(
        is_grace=recipe.system.host == "grace",
        overlaps_experts=overlaps_experts(recipe, schedule),
        is_graphed=recipe.cuda_graphs.implementation == "full_iteration",
    )


def efficiency_bandwidth(recipe: Recipe) -> float:
    """Datasheet HBM bandwidth of the recipe's GPU in bytes per second."""
    gpu = recipe.system.gpu
    return gpu.hbm_bytes_per_s if gpu is not None else float("inf")


def optimizer_bytes(recipe: Recipe) -> float:
    """Bytes that the optimizer step moves on the rank that has most layers.

    Per parameter of its shard: the gradient's square read, 4; gradient 4, main weight 4 + 4, both moments
    read and written, the new weight 2. Per parameter whose gradient the rank accumulates, all of its own or
    Megatron-FSDP's shard: the buffer zeroed, g. Several optimizer instances hold that many times as much.
    Offloaded state passes over PCIe instead, which is not counted.
    """
    optimizer, parallel = recipe.optimizer, recipe.parallel
    params = rank_params(recipe, _fullest_rank(recipe))
    is_sharded = parallel.data_sharding != "none"
    instances = parallel.num_optimizer_instances
    dense = params.dense / (parallel.dense_shards / instances if is_sharded else 1)
    expert = params.expert / (parallel.expert_data / instances if is_sharded else 1)
    moments = STATE_BYTES[optimizer.exp_avg_dtype] + STATE_BYTES[optimizer.exp_avg_sq_dtype]
    per_shard = 4 * _FP32_BYTES + 2 * moments + activation_element_bytes(recipe)
    divides_gradients = parallel.data_sharding == "megatron_fsdp" and parallel.fsdp_strategy != "optim"
    zeroed = dense + expert if divides_gradients else params.dense + params.expert
    return (dense + expert) * per_shard + zeroed * gradient_bytes(recipe)


def _fullest_rank(recipe: Recipe) -> int:
    chunks = recipe.chunks()
    num_layers = [0] * recipe.parallel.pipeline
    for chunk in chunks:
        num_layers[chunk.pipeline_rank] += sum(map(recipe.model.is_moe_layer, chunk.layers)) * 1000
        num_layers[chunk.pipeline_rank] += len(chunk.layers)
    return num_layers.index(max(num_layers))


def _syncs(recipe: Recipe, fabric: Fabric, traits: Traits) -> dict[Phase, SyncWork]:
    """Once-per-step gradients and parameters, and under FORWARD what every micro batch repeats."""
    chunks = recipe.chunks()
    rank = _fullest_rank(recipe)
    own = [chunk for chunk in chunks if chunk.pipeline_rank == rank]
    times: dict[Phase, list[LinkTime]] = {
        Phase.GRADIENT_SYNC: [],
        Phase.PARAMETER_SYNC: [],
        Phase.FORWARD: [],
    }
    buckets: dict[Phase, int] = dict.fromkeys(times, 0)
    is_fsdp = recipe.parallel.data_sharding == "megatron_fsdp"
    for phase, number, call in state_calls(recipe, own):
        time = fabric.time(call.op, call.group, call.num_bytes)
        if not (time.nvlink_s or time.nic_s):
            continue
        repeats, once = divmod(number, recipe.num_micro_batches) if is_fsdp else (0, number)
        if traits.keeps_gathered_weights and recipe.parallel.pipeline > 1:
            repeats, once = 0, max(1, once)
        once_phase = phase if phase is Phase.PARAMETER_SYNC else Phase.GRADIENT_SYNC
        times[Phase.FORWARD] += [time] * repeats
        times[once_phase] += [time] * once
        buckets[once_phase] += once
        buckets[Phase.FORWARD] += repeats
    return {phase: SyncWork(times=tuple(times[phase]), num_buckets=max(1, buckets[phase])) for phase in times}


def _transfer(recipe: Recipe, fabric: Fabric) -> LinkTime:
    hidden = token_counts(recipe).sharded * recipe.model.hidden_size * activation_element_bytes(recipe)
    return fabric.time(Collective.SEND, Group.PIPELINE, hidden)
