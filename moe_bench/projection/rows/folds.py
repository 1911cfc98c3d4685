"""Groups of published rows: the folds of a cross-validation, and rows that repeat one configuration."""

from __future__ import annotations

import re
from typing import Literal

from moe_bench.projection.rows.stack import Suite, stack_of
from moe_bench.results.published import PublishedRow, model_key

FoldBy = Literal["model", "layout", "system", "release"]

_PROXY = re.compile(r"_proxy_\d+l$")
_LLAMA = re.compile(r"llama3(?:_1)?_(\d+b)")
_WITH_SIZE = {"grok_1": "grok_1_314b"}
"""Names that a source prints with the size and without."""
_BUILDS = {"h100_96gb": "h100"}
"""Parts that are one GPU with another memory."""


def fold_of(row: PublishedRow, by: FoldBy) -> str:
    """The group that is left out together with `row`, from the row's own fields.

    `model`: its family; Llama 3 and 3.1 of one size have one shape, and a proxy is its model with fewer
    layers. `layout`: model with TP, PP, VPP, CP, EP and micro batch. `system`: the GPU. `release`: suite and
    version.
    """
    if by == "model":
        return model_family(row.model)
    if by == "system":
        name = (row.hardware or "unknown").lower().replace("-", "_")
        return _BUILDS.get(name, name)
    if by == "release":
        return _release(row)
    return _layout(row)


def model_family(name: str) -> str:
    """The key of a printed model, the same for all models of one shape but for their number of layers."""
    key = _PROXY.sub("", model_key(name))
    return _LLAMA.sub(r"llama3_\1", _WITH_SIZE.get(key, key))


def configuration_key(row: PublishedRow) -> str:
    """Equal for rows that print the same configuration, whatever the release: repeats of one experiment."""
    parts = (row.hardware, row.precision, row.num_gpus, row.seq_len, row.gbs)
    return "|".join((_layout(row), *map(str, parts)))


def _layout(row: PublishedRow) -> str:
    sizes = {
        "tp": row.tp,
        "pp": row.pp,
        "vpp": row.vpp,
        "cp": row.cp,
        "ep": row.ep,
        "mbs": row.mbs or row.local_batch,
    }
    shape = " ".join(f"{name}{size or 1}" for name, size in sizes.items())
    return f"{model_key(row.model)} {shape}"


def _release(row: PublishedRow) -> str:
    stack = stack_of(row)
    suite = row.framework if stack.suite is Suite.OTHER else str(stack.suite)
    return f"{suite} {stack.release or 'undated'}"
