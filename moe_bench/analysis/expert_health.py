"""How evenly the experts of a layer are used, from the tokens that each of them got."""

from __future__ import annotations

import math
from collections.abc import Sequence


def load_entropy_fraction(tokens_per_expert: Sequence[int]) -> float | None:
    """Entropy of the load over that of an even one: H = -sum p_e ln p_e / ln E, p_e = n_e / sum n.

    1 where all experts get the same, 0 where one gets all; None without a token or with one expert.
    """
    total = sum(tokens_per_expert)
    if not total or len(tokens_per_expert) < 2:
        return None
    shares = [tokens / total for tokens in tokens_per_expert if tokens]
    # - 0.0 of a single share is 0.0
    return abs(math.fsum(share * math.log(share) for share in shares)) / math.log(len(tokens_per_expert))


def dropped_fraction(*, num_choices: int, num_taken: int) -> float:
    """Choices of tokens that found no place, over all: 1 - sum n_e / (T k)."""
    return 1 - num_taken / num_choices


def default_alarm_share_fraction(*, num_experts: int, top_k: int) -> float:
    """Half-way, on a scale of ratios, from balance, k / E of the tokens, to collapse, all: sqrt(k / E).

    0.50 of Mixtral's 8 experts with 2 per token (twice the mean), 0.25 of Qwen3's 128 with 8 (4 x), 0.18 of
    DeepSeek-V3's 256 with 8 (5.7 x). One number of any kind cannot serve all three: a fixed multiple of the
    mean above 4 can never come about with Mixtral.
    """
    return math.sqrt(top_k / num_experts)
