"""One MoE layer on one rank, and nothing around it: what `moe-bench layer` builds, times and compares."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from moe_bench.errors import BadInputError
from moe_bench.spec.activation import Activation
from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.model import MixtureOfExperts, Router
from moe_bench.spec.recipe import DispatchSpec, Fusions, KernelSpec, LowPrecision, Precision, Recipe
from moe_bench.spec.routing_trace import read_trace

SWEEP_EXPONENTS = (0.25, 0.5, 0.75, 1.0, 1.25)
"""From a mild slope to one on which the busiest of 128 experts gets 25 times the mean."""

RoutingKind = Literal["balanced", "random", "power_law", "trace"]


class LayerRouting(Spec):
    """How many tokens each expert gets."""

    kind: RoutingKind
    """`balanced`: experts in turn, as many tokens each. `random`: every expert as likely as another.
    `power_law`: the n-th most popular expert as likely as n^-exponent. `trace`: as likely as was recorded."""
    exponent: NonNegativeFloat = 0.0
    """Read with `power_law`; 0 is `random`."""
    shares: tuple[NonNegativeInt, ...] = ()
    """Tokens of each expert, as recorded; read with `trace`."""
    source: Text | None = None
    """File that the trace was read from."""

    @property
    def label(self) -> str:
        """`power_law 0.8` or `trace`, as a table names it."""
        return f"{self.kind} {self.exponent:g}" if self.kind == "power_law" else self.kind


class LayerCase(Spec):
    """Everything that defines one MoE layer on one rank. Two engines given the same case do the same work.

    Of the experts this rank, the first of `ep_size`, holds the first `num_local_experts`.
    """

    name: Text
    """Of the recipe that it is a layer of, or of a shape of a suite."""
    hidden_size: PositiveInt
    moe: MixtureOfExperts
    """Experts, top-k, widths and router, over all expert-parallel ranks."""
    activation: Activation
    linear_bias: bool
    """Biases on the router and on both projections of the experts."""
    init_std: PositiveFloat
    """Standard deviation of all weights."""
    num_tokens: PositiveInt
    """That this rank routes, before each is copied to its experts."""
    ep_size: PositiveInt = 1
    routing: LayerRouting = LayerRouting(kind="balanced")
    precision: Precision
    low_precision: LowPrecision | None = None
    kernels: KernelSpec
    dispatch: DispatchSpec
    seed: NonNegativeInt = 1234
    """Of weights, inputs and routing."""

    @model_validator(mode="after")
    def _require_whole_shares(self) -> Self:
        if self.moe.num_experts % self.ep_size:
            raise ValueError(f"ep_size {self.ep_size} does not divide {self.moe.num_experts} experts")
        if self.routing.kind == "trace" and len(self.routing.shares) != self.moe.num_experts:
            raise ValueError(
                f"the trace counts {len(self.routing.shares)} experts, the layer has {self.moe.num_experts}"
            )
        return self

    @property
    def num_local_experts(self) -> int:
        """Experts whose weights this rank holds."""
        return self.moe.num_experts // self.ep_size

    @property
    def num_rows(self) -> int:
        """Rows of this rank's tokens, each copied to `top_k` experts; with balance also what it receives."""
        return self.num_tokens * self.moe.top_k

    def with_kernels(self, kernels: KernelSpec) -> LayerCase:
        """The same layer on other kernels."""
        return self.model_copy(update={"kernels": kernels})

    def with_routing(self, routing: LayerRouting) -> LayerCase:
        """The same layer with other loads. Raises BadInputError for a trace of another number of experts."""
        if routing.kind == "trace" and len(routing.shares) != self.moe.num_experts:
            raise BadInputError(
                f"{routing.source}: counts {len(routing.shares)} experts, {self.name} has "
                f"{self.moe.num_experts}; name a trace of this model"
            )
        return self.model_copy(update={"routing": routing})

    def folded(self) -> LayerCase:
        """The experts of this rank as a layer of their own, for engines without expert parallelism.

        As many tokens are routed as give the experts the rows that they get under expert parallelism, each
        to `top_k / ep_size` of them, 2 at least, so that there are weights to choose. The router is narrower,
        and has no groups. Losses that only some engines have (balance, z) are off. With `ep_size` 1 nothing
        else changes.
        """
        fewest = min(2, self.num_local_experts, self.moe.top_k)
        top_k = max(fewest, self.moe.top_k // self.ep_size)
        router = self.moe.router.model_copy(
            update={"aux_loss": "none", "aux_loss_coefficient": 0.0, "z_loss_coefficient": 0.0}
        )
        if self.ep_size > 1:
            router = router.model_copy(update={"num_groups": None, "groups_per_token": None})
        if top_k == 1 and router.score_function == "softmax":
            # over the one that is chosen it is 1, and Megatron-Core refuses it
            router = router.model_copy(update={"renormalise": False})
        moe = self.moe.model_copy(
            update={"num_experts": self.num_local_experts, "top_k": top_k, "router": router}
        )
        routing = self.routing
        if routing.kind == "trace":
            routing = routing.model_copy(update={"shares": routing.shares[: self.num_local_experts]})
        return self.model_copy(
            update={
                "moe": moe,
                "ep_size": 1,
                "num_tokens": self.num_rows // top_k,
                "routing": routing,
                "dispatch": self.dispatch.model_copy(update={"dispatcher": "alltoall", "num_sms": None}),
            }
        )


def layer_case_of(recipe: Recipe, *, num_tokens: int | None = None) -> LayerCase:
    """An expert layer of `recipe` as one of its ranks has it.

    `num_tokens` is by default what a micro batch gives one rank: micro batch x sequence / (CP x TP), the
    sequence being cut over tensor ranks as well. A shared expert is whole and sees the rank's tokens, where
    tensor ranks would each have a slice of it and see all of theirs: the same work.

    Raises BadInputError for a dense model, and for what a layer alone does not have.
    """
    model, parallel = recipe.model, recipe.parallel
    if model.moe is None:
        raise BadInputError(f"{recipe.name}: {model.key} has no expert layers; name a model with experts")
    router, mixing = model.moe.router, model.moe.shared_expert_mixing
    for is_there, problem in (
        (model.moe.steps, "model.moe.steps: a layer alone has no others; remove them"),
        (
            router.choice != "top_k",
            f"model.moe.router.choice {router.choice}: a layer alone is told where each token goes; name a "
            "model whose tokens take their top-k",
        ),
        (
            mixing != "sum",
            f"model.moe.shared_expert_mixing {mixing}: a layer alone adds its shared experts; name another "
            "model",
        ),
        (model.moe.latent_size, "model.moe.latent_size: no code builds such experts alone"),
        (
            parallel.expert_tensor > 1,
            f"parallel.expert_tensor {parallel.expert_tensor}: a layer alone has whole experts; set it to 1",
        ),
        (recipe.token_drop, "token_drop: a layer alone drops no tokens; set it to null"),
    ):
        if is_there:
            raise BadInputError(f"{recipe.name}: {problem}")
    tokens = recipe.micro_batch_size * recipe.seq_len // (parallel.context * parallel.tensor)
    return LayerCase(
        name=recipe.name,
        hidden_size=model.hidden_size,
        moe=model.moe,
        activation=model.activation,
        linear_bias=model.linear_bias,
        init_std=model.init_std,
        num_tokens=tokens if num_tokens is None else num_tokens,
        ep_size=parallel.expert,
        precision=recipe.precision,
        low_precision=_everywhere(recipe.low_precision),
        kernels=recipe.kernels.model_copy(update={"op_fuser": False}),
        dispatch=recipe.dispatch.model_copy(
            update={"dispatcher": "alltoall", "num_sms": None, "high_priority_stream": False}
        ),
        seed=recipe.seed,
    )


def _everywhere(low: LowPrecision | None) -> LowPrecision | None:
    """The options of a layer that is neither the first nor the last of a model."""
    if low is None:
        return None
    return low.model_copy(update={"num_first_layers_bf16": 0, "num_last_layers_bf16": 0})


def traced_routing(path: Path, *, option: str, choices: str) -> LayerRouting:
    """The loads of the most unequal layer of a recorded trace, a JSON list with a list of counts per layer.

    Raises BadInputError, naming `option` and its `choices`, where the file is something else or counts none.
    """
    trace = [layer for layer in read_trace(path, option=option, choices=choices) if sum(layer)]
    if not trace:
        raise BadInputError(f"{option} {path}: counts no tokens; write {choices}")
    worst = max(trace, key=lambda layer: max(layer) * len(layer) / sum(layer))
    return LayerRouting(kind="trace", shares=worst, source=str(path))


def sweep_of(case: LayerCase) -> tuple[LayerCase, ...]:
    """The case with balanced routing, then with ever steeper power laws."""
    laws = (LayerRouting(kind="power_law", exponent=exponent) for exponent in SWEEP_EXPONENTS)
    return tuple(case.with_routing(routing) for routing in (LayerRouting(kind="balanced"), *laws))


def layer_differences(recipe: Recipe) -> tuple[str, ...]:
    """What is otherwise in the layer alone than in a step of `recipe`, a sentence each."""
    said = (
        (
            recipe.dispatch.dispatcher not in ("alltoall", "allgather"),
            f"dispatch.dispatcher: {recipe.dispatch.dispatcher} needs other ranks and is not run",
        ),
        (recipe.kernels.op_fuser, "kernels.op_fuser: fc1, activation and fc2 run one after another"),
        (recipe.recompute.granularity != "none", "recompute: nothing is computed twice"),
        (
            recipe.overlap.expert_parallel or recipe.overlap.shared_experts,
            "overlap: parts run one after another",
        ),
        (recipe.cuda_graphs.implementation != "none", "cuda_graphs: kernels are started one by one"),
        (
            recipe.parallel.tensor > 1
            and bool(recipe.model.moe and recipe.model.moe.shared_expert_ffn_hidden_size),
            "parallel.tensor: the shared expert is whole and sees this rank's tokens only",
        ),
    )
    return tuple(sentence for is_true, sentence in said if is_true)


def swiglu_case(
    name: str,
    *,
    num_tokens: int,
    hidden_size: int,
    expert_ffn_hidden_size: int,
    num_experts: int,
    top_k: int,
    fusions: Fusions | None = None,
) -> LayerCase:
    """A BF16 layer of SwiGLU experts behind a softmax router over the chosen, all of it on one rank, on
    torch-native kernels; by default none of them is fused.
    """
    return LayerCase(
        name=name,
        hidden_size=hidden_size,
        moe=MixtureOfExperts(
            num_experts=num_experts,
            top_k=top_k,
            expert_ffn_hidden_size=expert_ffn_hidden_size,
            router=Router(score_function="softmax", renormalise=True),
        ),
        activation=Activation(kind="swiglu"),
        linear_bias=False,
        init_std=0.02,
        num_tokens=num_tokens,
        routing=LayerRouting(kind="random"),
        precision="bf16",
        kernels=KernelSpec(family="torch_native", fusions=fusions or Fusions()),
        dispatch=DispatchSpec(dispatcher="alltoall"),
    )
