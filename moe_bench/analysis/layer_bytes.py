"""Bytes that router, permutation and unpermutation of one MoE layer must move, however they are written.

T tokens of d elements of b bytes leave as T k rows to the experts, and R rows arrive. Weights of the router,
scores and indices are left out: for the shapes of today's models they are below 2 % of these.
"""

from __future__ import annotations

from moe_bench.spec.layer_case import LayerCase


def router_bytes(case: LayerCase) -> int:
    """3 T d b: forward every token read; backward read again for the gate's gradient, and its own written."""
    return 3 * case.num_tokens * _row_bytes(case)


def permute_bytes(case: LayerCase, *, num_received_rows: int) -> int:
    """2 (T + T k) d b: tokens read and their copies written forward, the reverse backward.

    With expert parallelism rows are sorted once more on arrival, by local expert where a rank has several:
    4 R d b more.
    """
    copied = 2 * (case.num_tokens + case.num_rows) * _row_bytes(case)
    return copied + _sorting_bytes(case, num_received_rows)


def unpermute_bytes(case: LayerCase, *, num_received_rows: int) -> int:
    """2 (T k + T) d b as above, in the other order.

    With shared experts their outputs are added: 2 T d b more forward, as the sum of both is read and written;
    backward the gradient serves both.
    """
    copied = 2 * (case.num_tokens + case.num_rows) * _row_bytes(case)
    shared = 2 * case.num_tokens * _row_bytes(case) if case.moe.shared_expert_ffn_hidden_size else 0
    return copied + shared + _sorting_bytes(case, num_received_rows)


def _sorting_bytes(case: LayerCase, num_received_rows: int) -> int:
    is_sorted_again = case.ep_size > 1 and case.num_local_experts > 1
    return 4 * num_received_rows * _row_bytes(case) if is_sorted_again else 0


def _row_bytes(case: LayerCase) -> int:
    return case.hidden_size * (4 if case.precision == "fp32" else 2)
