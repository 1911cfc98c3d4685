"""Why an engine of other people cannot run a case: what is asked for in common of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from moe_bench.spec.layer_case import LayerCase

PLAIN_PRECISIONS = ("fp32", "bf16")


def first_problem(problems: Iterable[tuple[bool, str]]) -> str | None:
    """The text of the first pair that is true."""
    return next((text for is_problem, text in problems if is_problem), None)


def not_installed(module: str, pip_line: str) -> str | None:
    """That a package is absent, with the line that installs it; it is not imported."""
    return None if find_spec(module) is not None else f"not installed: {pip_line}"


def not_plain(case: LayerCase) -> str | None:
    """That a case has what no peer has: expert parallelism, narrow products."""
    return first_problem(
        (
            (case.ep_size > 1, f"{case.ep_size} expert-parallel ranks; compare `folded()`, all on this rank"),
            (case.precision not in PLAIN_PRECISIONS, f"computes in FP32 or BF16, not in {case.precision}"),
        )
    )


def not_plain_softmax(case: LayerCase) -> str | None:
    """That the router does more than softmax and top-k, with or without renormalising."""
    router = case.moe.router
    return first_problem(
        (
            (router.score_function != "softmax", f"its router has softmax, not {router.score_function}"),
            (router.num_groups is not None, "its router has no groups"),
            (router.expert_bias, "its router has no balancing bias"),
            (router.scaling_factor != 1.0, f"its router does not scale by {router.scaling_factor:g}"),
        )
    )


def not_swiglu(case: LayerCase) -> str | None:
    """That the experts are other than SwiGLU without biases."""
    return first_problem(
        (
            (case.activation.kind != "swiglu", f"its experts are SwiGLU, not {case.activation.kind}"),
            (case.linear_bias, "its router and experts have no biases"),
        )
    )


def has_shared_expert(case: LayerCase) -> str | None:
    """That there is a shared expert, for engines without one."""
    return "it has no shared expert" if case.moe.shared_expert_ffn_hidden_size else None


def lacks_shared_expert(case: LayerCase) -> str | None:
    """That there is no shared expert, or a gated one, for engines that always have a plain one."""
    moe = case.moe
    return first_problem(
        (
            (not moe.shared_expert_ffn_hidden_size, "it always has a shared expert, and this layer has none"),
            (moe.shared_expert_gate, "its shared expert has no gate"),
        )
    )
