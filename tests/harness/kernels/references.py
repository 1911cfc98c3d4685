"""What the kernels compute, written as loops over single tokens in whatever precision the inputs have."""

import torch
from torch import Tensor


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """One query, one head, one sequence at a time; shapes as in `attention_kernels`."""
    num_tokens, num_sequences, num_heads, _ = query.shape
    heads_per_group = num_heads // key.shape[2]
    rows = []
    for position in range(num_tokens):
        first = 0 if window is None else max(0, position - window)
        outputs = []
        for sequence in range(num_sequences):
            for head in range(num_heads):
                group = head // heads_per_group
                scores = key[first : position + 1, sequence, group] @ query[position, sequence, head] * scale
                weights = scores.exp()
                total = weights.sum() if sink is None else weights.sum() + sink[head].exp()
                outputs.append(weights / total @ value[first : position + 1, sequence, group])
        rows.append(torch.cat(outputs).view(num_sequences, -1))
    return torch.stack(rows)


def experts_reference(
    tokens: Tensor,
    counts: list[int],
    probabilities: Tensor,
    weights: dict[str, Tensor],
    *,
    alpha: float = 1.0,
    offset: float = 0.0,
    clamp: float | None = None,
) -> Tensor:
    """One token at a time through its expert's two matrices."""
    rows, start = [], 0
    for expert, count in enumerate(counts):
        for token in range(start, start + count):
            hidden = weights["linear_fc1.weight"][expert] @ tokens[token]
            if "linear_fc1.bias" in weights:
                hidden = hidden + weights["linear_fc1.bias"][expert]
            gate, linear = hidden.chunk(2)
            if clamp is not None:
                gate, linear = gate.clamp(max=clamp), linear.clamp(-clamp, clamp)
            activated = gate * torch.sigmoid(alpha * gate) * (linear + offset)
            output = weights["linear_fc2.weight"][expert] @ activated
            if "linear_fc2.bias" in weights:
                output = output + weights["linear_fc2.bias"][expert]
            rows.append(output * probabilities[token])
        start += count
    return torch.stack(rows)


def rms_norm_reference(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, written out."""
    mean_square = (vector * vector).sum(dim=-1, keepdim=True) / vector.shape[-1]
    return vector / (mean_square + eps).sqrt() * weight
