"""The words of the page: what a recipe asks for, where a row stands, where a run was made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.analysis.size import counted_size
from moe_bench.report.figures import GIGA
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.published import PublishedRow, Source
from moe_bench.results.record import Provenance, Record
from moe_bench.spec.recipe import Recipe

_NAMES = {
    "transformer_engine": "Transformer Engine",
    "torch_native": "torch-native",
    "adam": "Adam",
    "muon": "Muon",
    "sgd": "SGD",
    "none": "not sharded",
    "distributed_optimizer": "distributed optimizer",
    "megatron_fsdp": "Megatron-FSDP",
}
"""How people write what a recipe calls by a key; a key that is not here is its own name."""
_BILLION = 1e9
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
_THREAD = re.compile(r"(?:issue|PR) #(\d+)")
_VERSION = re.compile(r"(?:tag )?(\S+)")
_PATH = re.compile(r"([\w./-]+)(?!\S)(?! / )")
"""Of a source, as it is written in the registry: the first file or folder, without the words behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A label and what it says."""

    label: str
    text: str
    url: str | None = None


def system_text(recipe: Recipe) -> str:
    """How many of what `recipe` runs on."""
    num_ranks, name = recipe.parallel.num_gpus, recipe.system.display_name
    if recipe.system.gpu is None:
        return f"{num_ranks} {'process' if num_ranks == 1 else 'processes'} on {name[0].lower()}{name[1:]}"
    return f"{num_ranks} × {name}"


def recipe_facts(recipe: Recipe, row: PublishedRow | None) -> tuple[Fact, ...]:
    """What a card says of `recipe`; `row` is the published one that it copies."""
    model, kernels, dispatch = recipe.model, recipe.kernels, recipe.dispatch
    size = counted_size(model)
    optimizer, sharding = recipe.optimizer, recipe.parallel.data_sharding
    moments = dict.fromkeys(kind.upper() for kind in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    facts = [
        Fact(label="system", text=system_text(recipe)),
        Fact(label="layout", text=layout_label(recipe) or "DP1"),
        Fact(label="precision", text=recipe.precision.upper().replace("_", " ")),
        Fact(
            label="parameters",
            text=f"{size.total[size.nearest_total] / _BILLION:,.1f} B, "
            f"{size.active[size.nearest_active] / _BILLION:,.1f} B active per token",
        ),
        Fact(label="layers", text=_layers_text(recipe)),
        Fact(
            label="batch",
            text=f"{recipe.global_batch_size:,} sequences of {recipe.seq_len:,} tokens; micro batch "
            f"{recipe.micro_batch_size}, {recipe.num_micro_batches} per rank",
        ),
        Fact(
            label="kernels",
            text=f"{_NAMES.get(kernels.family, kernels.family)}, {dispatch.dispatcher} dispatch, "
            f"{'grouped GEMM' if kernels.grouped_gemm else 'one GEMM per expert'}",
        ),
        Fact(label="routing", text=recipe.routing.mode.replace("_", " ")),
        Fact(label="recomputed", text=_recompute_text(recipe)),
        Fact(
            label="optimizer",
            text=f"{_NAMES[optimizer.name]}, gradients {optimizer.gradient_dtype.upper()}, "
            f"moments {' and '.join(moments)}, {_NAMES[sharding]}",
        ),
    ]
    if recipe.origin is not None:
        changes = "".join(f", {change}" for change in recipe.origin.changes)
        text = f"{recipe.origin.recipe}{changes}, {recipe.origin.scaling} scaling"
        facts.append(Fact(label="comes from", text=text))
    if row is not None:
        facts.append(Fact(label="copies row", text=row.id, url=row_source(row).url))
        facts.append(Fact(label="published", text=_published_text(row)))
    return tuple(facts)


def _layers_text(recipe: Recipe) -> str:
    model = recipe.model
    if model.moe is None:
        return f"{model.num_layers}, without experts"
    moe = model.moe
    dense = f"{model.num_dense_layers} dense, " if model.num_dense_layers else ""
    shared = ", a shared one" if moe.shared_expert_ffn_hidden_size else ""
    mtp = f", {recipe.num_mtp_layers} MTP" if recipe.num_mtp_layers else ""
    num_moe = model.num_layers - model.num_dense_layers
    counts = " to ".join(map(str, moe.expert_counts))
    return f"{dense}{num_moe} with {counts} experts, {moe.top_k} per token{shared}{mtp}"


def _recompute_text(recipe: Recipe) -> str:
    recompute = recipe.recompute
    if recompute.granularity == "selective":
        return ", ".join(recompute.modules)
    return "nothing" if recompute.granularity == "none" else f"whole layers ({recompute.method})"


def _published_text(row: PublishedRow) -> str:
    tokens_per_s = row.tokens_per_s_per_gpu
    parts = [] if tokens_per_s is None else [f"{tokens_per_s:,.0f} tokens/s/GPU"]
    if row.metrics.tflops_per_gpu is not None:
        parts.append(f"{row.metrics.tflops_per_gpu:g} TFLOPs/GPU as printed")
    return ", ".join([*parts, f"trust {row.trust}"])


def row_source(row: PublishedRow) -> Fact:
    """Where a row is printed, with an address where one follows from the source, and the row's name."""
    source = row.source
    place = ", ".join(part for part in (source.repo, source.path, source.table, source.paper) if part)
    return Fact(label=place or source.url or "not named", text=row.id, url=source_url(source))


def source_url(source: Source) -> str | None:
    """The page of a source: its own address, the paper, the issue or pull request, or the file as read."""
    if source.url is not None:
        return source.url
    paper = _ARXIV.search(source.paper or "")
    if paper is not None:
        return f"https://arxiv.org/abs/{paper[1]}"
    if source.repo is None:
        return None
    repo = f"https://github.com/{source.repo}"
    thread = _THREAD.match(source.path or "")
    if thread is not None:
        # GitHub leads from the number of a pull request to the pull request
        return f"{repo}/issues/{thread[1]}"
    version, path = _VERSION.match(source.commit or ""), _PATH.match(source.path or "")
    if version is None or path is None:
        return repo
    kind = "blob" if "." in path[1].rpartition("/")[2] else "tree"
    return f"{repo}/{kind}/{version[1]}/{path[1]}"


def row_sources(rows: Iterable[PublishedRow]) -> tuple[Fact, ...]:
    """Every source once, with the names of its rows."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for fact in map(row_source, rows):
        names.setdefault((fact.label, fact.url), []).append(fact.text)
    return tuple(Fact(label=label, text=", ".join(found), url=url) for (label, url), found in names.items())


def run_provenance(record: Record) -> tuple[Fact, ...]:
    """Where, when and with what a run was made."""
    provenance = record.provenance
    git = provenance.git
    source = "installed without a checkout"
    if git.commit is not None:
        changes = ", uncommitted changes" if git.is_dirty else ""
        source = f"{git.commit[:12]} on {git.branch or 'no branch'}{changes}"
    hosts = list(dict.fromkeys(provenance.hosts))
    packages = [f"{name} {version}" for name, version in sorted(provenance.packages.items())]
    variables = [f"{name}={value}" for name, value in sorted(provenance.environment.items())]
    return (
        Fact(label="started", text=provenance.started_at),
        Fact(label="source", text=source),
        Fact(label="job", text=provenance.job_id),
        Fact(label="hosts", text=f"{len(hosts)}: {hosts[0]}{f' to {hosts[-1]}' if len(hosts) > 1 else ''}"),
        Fact(label="processor", text=provenance.cpu_model or "not recorded"),
        *_gpu_facts(provenance),
        Fact(label="container", text=provenance.container or "none"),
        Fact(label="system", text=provenance.os),
        Fact(label="packages", text=", ".join([f"Python {provenance.python_version}", *packages])),
        Fact(label="environment", text=", ".join(variables) or "none of the variables that change a number"),
        Fact(label="command", text=" ".join(provenance.command)),
    )


def packages_said_once(runs: Iterable[tuple[str, tuple[Fact, ...]]]) -> tuple[tuple[Fact, ...], ...]:
    """The provenance of each of `runs`, (title, facts): equal packages refer to the first run with them."""
    first: dict[str, str] = {}
    found = []
    for title, facts in runs:
        shown = []
        for fact in facts:
            is_said = fact.label == "packages" and fact.text in first
            shown.append(Fact(label=fact.label, text=f"those of {first[fact.text]}") if is_said else fact)
            if fact.label == "packages":
                first.setdefault(fact.text, title)
        found.append(tuple(shown))
    return tuple(found)


def _gpu_facts(provenance: Provenance) -> tuple[Fact, ...]:
    gpus = provenance.gpus
    if not gpus:
        return (Fact(label="GPUs", text="none"),)
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    drivers = ", ".join(sorted({gpu.driver_version or "not recorded" for gpu in gpus}))
    clocks_hz = [gpu.sm_clock_hz for gpu in gpus if gpu.sm_clock_hz is not None]
    clocks = (
        f"{min(clocks_hz) / GIGA:.3f} to {max(clocks_hz) / GIGA:.3f} GHz" if clocks_hz else "not recorded"
    )
    limits_w = [gpu.power_limit_w for gpu in gpus if gpu.power_limit_w is not None]
    limits = f"{min(limits_w):.0f} to {max(limits_w):.0f} W" if limits_w else "not recorded"
    return (
        Fact(label="GPUs", text=f"{len(gpus)} × {names}"),
        Fact(label="driver", text=drivers),
        Fact(label="SM clock", text=clocks),
        Fact(label="power limit", text=limits),
        Fact(label="CUDA", text=provenance.cuda_version or "not recorded"),
        Fact(label="NCCL", text=provenance.nccl_version or "not recorded"),
    )
