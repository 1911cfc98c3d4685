"""What a quantisation found, as people read it: quality and size above, part by part below."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.results.quantization import PartSize, Quantization

_MIB = 2**20


def quantize_view(found: Quantization, *, weights: str, text: str, written_to: str | None) -> RenderableType:
    """`weights` and `text` say whose weights and what tokens these are."""
    original = found.original_dtype
    ranks = "one rank" if found.num_ranks == 1 else f"{found.num_ranks} ranks"
    lines = (
        f"{found.format} against {original}, {weights}, {found.num_tokens:,} tokens of {text}",
        f"perplexity     {found.perplexity:.4f} -> {found.quantized_perplexity:.4f}",
        f"KL divergence  {found.kl_divergence:.3e} nats per token",
        f"same choice    {found.same_choice_fraction:.2%} of tokens",
        f"weights        {found.original_bytes / _MIB:.3f} MiB -> {found.num_bytes / _MIB:.3f} MiB",
        *_arithmetic(found, ranks),
        *(() if written_to is None else (f"written to     {written_to}",)),
        "",
    )
    table = Columns(
        headings=("weights", "modules", "parameters", "bytes", "left out because"),
        rows=tuple(map(_row, found.parts)),
        right=frozenset({"modules", "parameters", "bytes"}),
    )
    return Group(Text("\n".join(lines)), table)


def _arithmetic(found: Quantization, ranks: str) -> tuple[str, ...]:
    """What rounded and what multiplied, and how far that is from the simulation."""
    rounded = f"rounded by     {found.simulated_by}, {ranks}"
    if found.kl_from_simulated is None:
        return (f"{rounded}; no 8-bit or 4-bit product ran",)
    products = (
        "packed weights, unpacked for each product; no 8-bit or 4-bit product ran"
        if found.kernels is None
        else f"packed weights and inputs, {found.kernels}"
    )
    return (
        rounded,
        f"multiplied     {products}",
        f"off simulated  {found.kl_from_simulated:.3e} nats per token of KL divergence",
    )


def _row(part: PartSize) -> tuple[str, ...]:
    return (
        part.name,
        str(part.num_modules),
        f"{part.num_params:,}",
        f"{part.num_bytes:,}",
        part.left_out_because or "",
    )


def quantize_json(
    found: Quantization, *, weights: str, text: str, written_to: str | None
) -> dict[str, object]:
    """The same for programs."""
    return {
        "weights": weights,
        "text": text,
        "written_to": written_to,
        "perplexity": found.perplexity,
        "quantized_perplexity": found.quantized_perplexity,
        "num_bytes": found.num_bytes,
        "original_bytes": found.original_bytes,
        **found.model_dump(mode="json"),
    }
