"""With mcore_experts.py all that knows Megatron-Core's field names: a recipe becomes arguments as plain data.

It imports neither torch nor Megatron-Core, so `show` prints on a laptop what a rank will be built with.
Types stand as text ("bf16"), functions as names ("silu"); `harness/build.py` turns them into objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_bench.harness.mcore_experts import expert_arguments, own_router_arguments
from moe_bench.harness.mcore_fields import Arguments, Plain, complaint_about, megatron_fields
from moe_bench.spec.legality.structure import built_model
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.pipeline import embedding_pipeline_ranks
from moe_bench.spec.problem import Problem
from moe_bench.spec.recipe import Recipe

_FP8_FORMATS = {
    "fp8_delayed": ("hybrid", "delayed"),
    "fp8_tensorwise": ("hybrid", "tensorwise"),
    "fp8_blockwise": ("e4m3", "blockwise"),
    "mxfp8": ("e4m3", "mxfp8"),
}
"""Format and recipe of Megatron-Core for each FP8 precision, as Megatron-Bridge's recipes pair them. Scales
per row are not among its own (core/enums.py, Fp8Recipe): its model is BF16, and our experts quantize.
"""
_ACTIVATIONS = {"swiglu": "silu", "clamped_swiglu": "quick_gelu", "gelu": "gelu_tanh"}
"""Of every activation that is built; the others are refused before (legality/structure.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronArguments:
    """What a rank is built with: the keyword arguments of Megatron-Core's objects, one mapping for each."""

    parallel_state: Arguments
    """`parallel_state.initialize_model_parallel`, and the pipeline ranks that hold the input embedding."""
    config_class: Literal["TransformerConfig", "MLATransformerConfig"]
    transformer: Arguments
    """The class above."""
    config_attributes: Arguments
    """Attributes that Megatron-Core's training script sets on the config after it is made (GPT's YaRN)."""
    model: Arguments
    """`GPTModel`, less what depends on the rank."""
    ddp: Arguments
    """`DistributedDataParallelConfig`"""
    optimizer: Arguments
    """`OptimizerConfig`"""
    training: Arguments
    """What our own loop needs: batches, steps, routing, kernel family, seed, patches."""

    def sections(self) -> dict[str, Arguments]:
        """The mappings by name, in the order in which `show` prints them."""
        return {
            "parallel_state": self.parallel_state,
            self.config_class: self.transformer,
            "config_attributes": self.config_attributes,
            "GPTModel": self.model,
            "DistributedDataParallelConfig": self.ddp,
            "OptimizerConfig": self.optimizer,
            "training": self.training,
        }


def megatron_arguments(recipe: Recipe) -> MegatronArguments:
    """Everything that the ranks of `recipe` are built with, its `mcore` overrides included."""
    covered = _covered_arguments(recipe)
    owners = {
        "TransformerConfig": covered.transformer,
        "DistributedDataParallelConfig": covered.ddp,
        "OptimizerConfig": covered.optimizer,
    }
    for name, value in recipe.mcore.items():
        for owner in megatron_fields().get(name, ()):
            owners[owner][name] = value
    return covered


def override_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """Names under `mcore:` that Megatron-Core does not have, or that the schema already covers."""
    if not recipe.mcore:
        return ()
    covered = _covered_arguments(recipe)
    taken = {**covered.transformer, **covered.ddp, **covered.optimizer}
    return tuple(
        Problem(("mcore", name), *complaint)
        for name in recipe.mcore
        if (complaint := complaint_about(name, covered=taken)) is not None
    )


def _covered_arguments(recipe: Recipe) -> MegatronArguments:
    is_mla = recipe.model.attention.kind == "mla"
    return MegatronArguments(
        parallel_state=_parallel_state(recipe),
        config_class="MLATransformerConfig" if is_mla else "TransformerConfig",
        transformer={
            **_architecture(built_model(recipe)),
            **_layout(recipe),
            **expert_arguments(recipe),
            **_precision(recipe),
            **_kernels(recipe),
            **_schedule(recipe),
            **_memory_savers(recipe),
        },
        config_attributes=_config_attributes(recipe.model),
        model=_model(recipe),
        ddp=_ddp(recipe),
        optimizer=_optimizer(recipe),
        training=_training(recipe),
    )


def _parallel_state(recipe: Recipe) -> Arguments:
    parallel = recipe.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": _virtual_size(recipe),
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "num_distributed_optimizer_instances": parallel.num_optimizer_instances,
        "embedding_pipeline_ranks": embedding_pipeline_ranks(
            parallel, num_mtp_layers=recipe.num_mtp_layers, is_tied=recipe.model.tied_embeddings
        ),
    }


def _virtual_size(recipe: Recipe) -> int | None:
    """Megatron-Core takes None, not 1, for a pipeline without virtual stages."""
    return recipe.parallel.virtual_pipeline if recipe.parallel.virtual_pipeline > 1 else None


def _architecture(model: ModelSpec) -> Arguments:
    moe_width = model.moe.expert_ffn_hidden_size if model.moe is not None else None
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.dense_ffn_hidden_size or moe_width,
        "num_attention_heads": model.attention.num_heads,
        "layernorm_epsilon": model.norm_epsilon,
        "normalization": "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        "gated_linear_unit": model.activation.is_gated,
        "activation_func": _ACTIVATIONS[model.activation.kind],
        "activation_func_clamp_value": model.activation.clamp_limit,
        "glu_linear_offset": model.activation.linear_offset,
        "add_bias_linear": model.linear_bias,
        # Megatron-Core's MLA always pairs neighbours, and refuses to be told so (transformer_config.py)
        "rotary_interleaved": model.rope.interleaved and model.attention.kind != "mla",
        "init_method_std": model.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **(
            _latent_attention(model, model.attention)
            if model.attention.kind == "mla"
            else _grouped_attention(model.attention)
        ),
    }


def _grouped_attention(attention: GroupedQueryAttention) -> Arguments:
    window = attention.sliding_window
    return {
        "num_query_groups": attention.num_query_groups,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.qkv_bias,
        "qk_layernorm": attention.qk_norm != "none",
        "softmax_type": "learnable" if attention.sinks else "vanilla",
        # Megatron-Core counts the tokens to the left of the query, the published configs the query too
        "window_size": None if window is None else (window.window_tokens - 1, 0),
        "window_attn_skip_freq": None if window is None else window.full_attention_every,
    }


def _latent_attention(model: ModelSpec, attention: MultiLatentAttention) -> Arguments:
    rope: Arguments = {
        "rope_type": "rope",
        "rotary_base": model.rope.rope_theta,
        "rotary_percent": model.rope.rotary_fraction,
    }
    if (yarn := model.rope.scaling) is not None:
        rope |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale_factor,
            "mscale_all_dim": yarn.mscale_all_dim_factor,
        }
    return {
        "multi_latent_attention": True,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_nope_head_dim,
        "qk_pos_emb_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "qk_layernorm": True,
        **rope,
    }


def _config_attributes(model: ModelSpec) -> Arguments:
    yarn = model.rope.scaling
    if yarn is None or model.attention.kind == "mla":
        return {}
    return {
        "yarn_rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_position_embeddings,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_mscale": yarn.mscale_factor,
        "yarn_mscale_all_dim": yarn.mscale_all_dim_factor,
        "yarn_correction_range_round_to_int": yarn.round_correction_range,
    }


def _layout(recipe: Recipe) -> Arguments:
    parallel = recipe.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": _virtual_size(recipe) if parallel.layout is None else None,
        "pipeline_model_parallel_layout": parallel.layout,
        "account_for_embedding_in_pipeline_split": parallel.embedding_counts_as_layer,
        "account_for_loss_in_pipeline_split": parallel.loss_counts_as_layer,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_first_stage or None,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_last_stage or None,
        "microbatch_group_size_per_vp_stage": parallel.micro_batch_group_size or None,
        "context_parallel_size": parallel.context,
        "cp_comm_type": "all_gather" if parallel.context_comm == "allgather" else parallel.context_comm,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.sequence_parallel,
        "mtp_num_layers": recipe.num_mtp_layers or None,
        "mtp_loss_scaling_factor": recipe.model.mtp_loss_factor,
    }


def _precision(recipe: Recipe) -> Arguments:
    low = recipe.low_precision
    dtype = "fp32" if recipe.precision == "fp32" else "bf16"
    arguments: Arguments = {"bf16": dtype == "bf16", "params_dtype": dtype, "pipeline_dtype": dtype}
    arguments |= {"fp8": None, "fp4": None}
    if recipe.precision in _FP8_FORMATS:
        arguments["fp8"], arguments["fp8_recipe"] = _FP8_FORMATS[recipe.precision]
    elif recipe.precision == "nvfp4":
        arguments |= {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    if low is not None:
        arguments |= {
            "fp4_param" if recipe.precision == "nvfp4" else "fp8_param": low.param_gather,
            "first_last_layers_bf16": bool(low.num_first_layers_bf16 or low.num_last_layers_bf16),
            "num_layers_at_start_in_bf16": low.num_first_layers_bf16,
            "num_layers_at_end_in_bf16": low.num_last_layers_bf16,
            "fp8_dot_product_attention": low.attention,
            "moe_router_padding_for_quantization": low.pad_routing_map,
        }
    return arguments


def _kernels(recipe: Recipe) -> Arguments:
    kernels, fusions = recipe.kernels, recipe.kernels.fusions
    is_engine = kernels.family == "transformer_engine"
    return {
        "transformer_impl": "transformer_engine" if is_engine else "local",
        "attention_backend": kernels.attention,
        "moe_grouped_gemm": kernels.grouped_gemm,
        "use_transformer_engine_op_fuser": kernels.op_fuser,
        # Transformer Engine's kernels; ours stand in the section `training`
        "moe_permute_fusion": is_engine and fusions.permute,
        "moe_router_fusion": is_engine and fusions.router,
        "apply_rope_fusion": fusions.rope,
        "bias_activation_fusion": fusions.activation,
        "fused_residual_rmsnorm": fusions.residual_norm,
        "masked_softmax_fusion": fusions.masked_softmax,
        "bias_dropout_fusion": fusions.bias_dropout,
        "gradient_accumulation_fusion": is_engine and fusions.gradient_accumulation,
        "cross_entropy_loss_fusion": fusions.cross_entropy != "none",
        "cross_entropy_fusion_impl": "te" if fusions.cross_entropy == "te" else "native",
        "use_cpu_initialization": recipe.system.gpu is None,
    }


def _schedule(recipe: Recipe) -> Arguments:
    overlap = recipe.overlap
    return {
        "overlap_p2p_comm": overlap.p2p,
        "batch_p2p_comm": not overlap.p2p,
        "deallocate_pipeline_outputs": True,
        "overlap_moe_expert_parallel_comm": overlap.expert_parallel,
        "delay_wgrad_compute": overlap.delayed_wgrad,
        "moe_shared_expert_overlap": overlap.shared_experts,
        "tp_comm_overlap": overlap.tensor_parallel,
        "cuda_graph_impl": recipe.cuda_graphs.implementation,
        "cuda_graph_modules": recipe.cuda_graphs.modules,
        "cuda_graph_warmup_steps": recipe.cuda_graphs.num_warmup_steps,
    }


def _memory_savers(recipe: Recipe) -> Arguments:
    recompute, offload = recipe.recompute, recipe.offload
    is_full = recompute.granularity == "full"
    return {
        "recompute_granularity": None if recompute.granularity == "none" else recompute.granularity,
        "recompute_modules": recompute.modules if recompute.granularity == "selective" else None,
        "recompute_method": recompute.method if is_full else None,
        "recompute_num_layers": recompute.num_layers if is_full else None,
        "cpu_offloading": offload.num_activation_layers > 0,
        "cpu_offloading_num_layers": offload.num_activation_layers,
        "fine_grained_activation_offloading": bool(offload.modules),
        "offload_modules": offload.modules,
        "moe_paged_stash": offload.paged_stash,
    }


def _model(recipe: Recipe) -> Arguments:
    model = recipe.model
    is_gpt_yarn = model.attention.kind == "gqa" and model.rope.scaling is not None
    position = "learned_absolute" if model.learned_positions else "yarn" if is_gpt_yarn else "rope"
    return {
        "vocab_size": model.vocab_size,
        "max_sequence_length": max(recipe.seq_len, model.max_position_embeddings),
        "position_embedding_type": position,
        "rotary_base": model.rope.rope_theta,
        "rotary_percent": model.rope.rotary_fraction,
        "share_embeddings_and_output_weights": model.tied_embeddings,
    }


def _ddp(recipe: Recipe) -> Arguments:
    parallel, overlap, low = recipe.parallel, recipe.overlap, recipe.low_precision
    is_fsdp = parallel.data_sharding == "megatron_fsdp"
    return {
        "grad_reduce_in_fp32": recipe.optimizer.gradient_dtype == "fp32",
        "overlap_grad_reduce": overlap.grad_reduce,
        "overlap_param_gather": overlap.param_gather,
        "align_param_gather": overlap.align_param_gather,
        "use_distributed_optimizer": parallel.data_sharding != "none",
        "num_distributed_optimizer_instances": parallel.num_optimizer_instances,
        "use_megatron_fsdp": is_fsdp,
        "data_parallel_sharding_strategy": parallel.fsdp_strategy if is_fsdp else "no_shard",
        "megatron_fsdp_main_grads_dtype": recipe.optimizer.gradient_dtype,  # by default that of the weights
        "fp8_param_gather": low is not None and low.param_gather and recipe.precision != "nvfp4",
        "fp4_param_gather": low is not None and low.param_gather and recipe.precision == "nvfp4",
        "reuse_grad_buf_for_mxfp8_param_ag": low is not None and low.reuse_grad_buffer,
        "delay_wgrad_compute": overlap.delayed_wgrad,
        # our own sanity check reads loss and gradient norm after the step, without a host synchronisation
        "check_for_nan_in_grad": False,
    }


def _optimizer(recipe: Recipe) -> Arguments:
    optimizer, overlap, low = recipe.optimizer, recipe.overlap, recipe.low_precision
    # offloading runs through the code of low-precision state, and refuses without it (arguments.py:1804)
    is_precision_aware = optimizer.is_precision_aware or recipe.offload.optimizer_fraction > 0
    return {
        "optimizer": optimizer.name,
        "lr": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_eps": optimizer.adam_epsilon,
        "clip_grad": optimizer.clip_grad_norm,
        "bf16": recipe.precision != "fp32",
        "params_dtype": "fp32" if recipe.precision == "fp32" else "bf16",
        "use_distributed_optimizer": recipe.parallel.data_sharding != "none",
        "use_precision_aware_optimizer": is_precision_aware,
        # read by the precision-aware optimizer only; the plain one keeps FP32 main gradients
        "main_grads_dtype": optimizer.gradient_dtype if is_precision_aware else "fp32",
        "main_params_dtype": optimizer.main_params_dtype,
        "exp_avg_dtype": optimizer.exp_avg_dtype,
        "exp_avg_sq_dtype": optimizer.exp_avg_sq_dtype,
        "overlap_param_gather": overlap.param_gather,
        "overlap_param_gather_with_optimizer_step": overlap.param_gather_with_optimizer_step,
        "optimizer_cpu_offload": recipe.offload.optimizer_fraction > 0,
        "optimizer_offload_fraction": recipe.offload.optimizer_fraction,
        "reuse_grad_buf_for_mxfp8_param_ag": low is not None and low.reuse_grad_buffer,
    }


def _training(recipe: Recipe) -> Arguments:
    attention = recipe.model.attention
    return {
        "kernel_family": recipe.kernels.family,
        "experts_are_fp8": recipe.precision == "fp8_rowwise",
        "triton_fusions": recipe.kernels.triton_fusions,
        **_quantization(recipe),
        "qk_norm": attention.qk_norm if isinstance(attention, GroupedQueryAttention) else "latent",
        "seq_length": recipe.seq_len,
        "micro_batch_size": recipe.micro_batch_size,
        "global_batch_size": recipe.global_batch_size,
        "world_size": recipe.parallel.num_gpus,
        "routing_mode": recipe.routing.mode,
        "routing_trace": recipe.routing.trace,
        **own_router_arguments(recipe),
        "num_warmup_steps": recipe.steps.num_warmup,
        "num_timed_steps": recipe.steps.num_timed,
        "seed": recipe.seed,
        "patches": recipe.patches,
        "device": None if recipe.system.gpu is None else recipe.system.gpu.device_name,
    }


def _quantization(recipe: Recipe) -> Arguments:
    """What nvidia-modelopt is told, which changes the model after Megatron-Core has built it."""
    asked = recipe.quantization
    return {
        "quantization_format": None if asked is None else asked.format,
        "quantizes_experts_only": asked is not None and asked.experts_only,
        "num_calibration_batches": 0 if asked is None else asked.num_calibration_batches,
    }


def as_json(arguments: MegatronArguments) -> Mapping[str, Mapping[str, Plain]]:
    """The sections as JSON can hold them."""
    return {name: dict(section) for name, section in arguments.sections().items()}
