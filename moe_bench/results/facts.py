"""What two runs must have in common to be compared, and the software that they were made with."""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.results.record import Record

Facts = Mapping[str, str]
"""What two runs must have in common, by dotted name; `dispatch.dispatcher` is a field of the recipe."""

_NAMES_ONLY = {"variant", "reproduces", "differences", "origin"}
"""Parts of a recipe that say what it is called and where it comes from, and change nothing that runs."""
_DESCRIPTIONS = {"display_name", "hf_id", "default_run", "published", "sources", "max_position_embeddings"}
"""The same for models and systems."""


def facts_of(record: Record) -> Facts:
    """Recipe as run, scale, GPUs and the kernels that ran.

    The way in which FLOPs are counted is not among them: it is the reader's, one for all records.
    """
    recipe = record.plan.recipe.model_dump(mode="json", exclude=_NAMES_ONLY)
    for part in ("model", "system"):
        recipe[part] = {key: value for key, value in recipe[part].items() if key not in _DESCRIPTIONS}
    facts = {"scale": str(record.plan.scale), "num_ranks": str(record.num_ranks), **_leaves(recipe)}
    if record.plan.is_slice:
        facts["rank"] = str(record.plan.rank)
    facts |= _leaves(record.samples.implementations.model_dump(mode="json"), "implementations.")
    facts["patches"] = ", ".join(record.samples.patches) or "none"
    gpus = record.provenance.gpus
    if gpus:
        for field in ("name", "power_limit_w", "max_sm_clock_hz", "memory_bytes"):
            facts[f"gpu.{field}"] = " and ".join(sorted({str(getattr(gpu, field)) for gpu in gpus}))
    else:
        facts["cpu_model"] = str(record.provenance.cpu_model)
    return facts


def software_of(record: Record) -> Facts:
    """Commit, packages, drivers and libraries that a record was made with."""
    provenance = record.provenance
    drivers = sorted({str(gpu.driver_version) for gpu in provenance.gpus})
    return {
        "commit": f"{provenance.git.commit}{' dirty' if provenance.git.is_dirty else ''}",
        **{f"packages.{name}": version for name, version in provenance.packages.items()},
        "driver": " and ".join(drivers) or "none",
        "nccl": str(provenance.nccl_version),
        "cuda": str(provenance.cuda_version),
        "python": provenance.python_version,
        "container": str(provenance.container),
    }


def _leaves(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Every leaf by its dotted name, as text."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            leaves[prefix + key] = ", ".join(map(str, value)) or "none"
        else:
            leaves[prefix + key] = "none" if value is None else str(value)
    return leaves
