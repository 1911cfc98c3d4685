"""Free text of the flat registry schema, such as `FSDP2 shard=8`, as columns of the project's schema."""

from __future__ import annotations

import re
from collections.abc import Callable

from moe_bench.spec.yaml_tree import Node

Columns = dict[str, Node]
Found = dict[str, object]
"""Columns of the project's schema with plain values."""

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp32": "fp32", "bf16": "bf16"}
_MODULES = {
    "norm": "layernorm",
    "act": "moe_act",
    "shared_expert": "shared_experts",
    "RMSNorm": "layernorm",
    "MLA up-projection": "mla_up_proj",
}
"""Recomputed modules in the words of other suites."""
_GRAPHS = ("none", "local", "transformer_engine", "full_iteration")
_BACKENDS = ("te", "gmm", "torch_mm", "te_mxfp8", "torchao_mxfp8")


def _sharding(text: str) -> Found | None:
    shards = re.search(r"shard[ =](\d+)", text)
    number: Found = {} if shards is None else {"num_shards": int(shards[1])}
    if "FSDP=0" in text or "ZeRO-1" in text:
        return {"sharding": "zero1"} | number
    if "FSDP2" in text:
        return {"sharding": "fsdp2"} | number
    return {"sharding": "fsdp"} | number if "FSDP" in text or "ZeRO-3" in text else None


def _dispatcher(text: str) -> Found | None:
    words = (
        ("hybridep", "hybridep"),
        ("deepep", "deepep"),
        ("alltoall", "alltoall"),
        ("all-to-all", "alltoall"),
    )
    found = next((name for word, name in words if word in text.lower()), None)
    return None if found is None else {"dispatcher": found}


def _recompute(text: str) -> Found | None:
    if text.startswith("none"):
        return {"recompute": "none"}
    if text.startswith("full"):
        layers = re.search(r"(\d+) layers", text)
        return {"recompute": "full"} | ({} if layers is None else {"recompute_num_layers": int(layers[1])})
    if text in ("selective", "selective AC"):
        return {"recompute": "selective"}
    modules = text.removeprefix("selective:").strip()
    if modules.startswith("none"):
        return {"recompute": "none"}
    names = [_MODULES.get(name.strip(), name.strip()) for name in re.split(r",| and ", modules)]
    return {"recompute": names} if all(re.fullmatch(r"[a-z_0-9]+", name) for name in names) else None


def _cuda_graph(text: str) -> Found | None:
    implementation, _, scope = text.partition(" scope=")
    if implementation not in _GRAPHS:
        return None
    modules = [] if scope == "None" else re.findall(r"\w+", scope)
    return {"cuda_graph": implementation} | ({"cuda_graph_modules": modules} if modules else {})


def _offload(text: str) -> Found | None:
    layers = re.search(r"cpu_offloading_num_layers=(\d+)", text)
    if layers is not None:
        return {"offload": "activation_layers", "offload_num_layers": int(layers[1])}
    if text.startswith("fine-grained"):
        modules = re.findall(r"\w+", text.partition(":")[2])
        return {"offload": "fine_grained"} | ({"offload_modules": modules} if modules else {})
    if text.startswith("optimizer"):
        return {"offload": "optimizer"}
    return {"offload": "none"} if text == "none" else None


def _optimizer(text: str) -> Found | None:
    found: Found = {}
    if "precision-aware" in text:
        found["precision_aware"] = True
    found |= {
        name: _DTYPES[dtype]
        for name, dtype in re.findall(r"(main_params|main_grads|exp_avg_sq|exp_avg) (\w+)", text)
        if dtype in _DTYPES
    }
    name = re.search(r"\b(AdamW|Adam|Muon)\b", text)
    if name is not None:
        found["name"] = name[1].lower()
    if "BF16 moments" in text:
        found |= {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    if text.startswith("torch "):
        found["implementation"] = "torch"
    if "no grad clip" in text:
        found["clip_grad"] = False
    return {"optimizer": found} if found else None


LOOSE_TEXTS: dict[str, Callable[[str], Found | None]] = {
    "fsdp_zero": _sharding,
    "dispatcher": _dispatcher,
    "recompute": _recompute,
    "cuda_graph": _cuda_graph,
    "offload": _offload,
    "optimizer": _optimizer,
}
"""Columns of free text; None where the words are not known, which leaves them in `other`."""


def columns_of_note(text: str) -> Found:
    """The pipeline layout string and the capacity factor that a remark names."""
    layout = re.search(r"layout (E[^\s;]+)", text)
    capacity = re.search(r"capacity factor ([\d.]*\d)", text)
    found: Found = {} if layout is None else {"layout": layout[1]}
    return found | ({} if capacity is None else {"capacity_factor": float(capacity[1])})


_OTHER: tuple[tuple[str, Callable[[str], Found]], ...] = (
    (r"method: (\S+)", lambda value: {"method": value}),
    (r"(?:moe_paged_stash|paged stash)", lambda _: {"paged_stash": True}),
    (r"delay_wgrad", lambda _: {"delay_wgrad": True}),
    (r"no delayed wgrad", lambda _: {"delay_wgrad": False}),
    (r"tp_comm_overlap", lambda _: {"tp_comm_overlap": True}),
    (r"permute fusion", lambda _: {"permute_fusion": True}),
    (r"fallback without permute fusion", lambda _: {"permute_fusion": False}),
    (r"(?:hybridep_sms=)?(\d+)(?: SMs(?: for communication)?)?", lambda n: {"dispatcher_sms": int(n)}),
    (r"num_layers=(\d+)", lambda n: {"num_layers": int(n)}),
    (r"LBS\(local batch\)=(\d+)", lambda n: {"local_batch": int(n)}),
    (r"local batch (?:size )?(\d+)(?: per DP rank)?", lambda n: {"local_batch": int(n)}),
    (r"capacity factor ([\d.]+)", lambda value: {"capacity_factor": float(value)}),
    (r"(?:pipeline schedule: )?(?i:(1f1b|zero-bubble|zbv|v-half|v-min|dualpipe))",
     lambda name: {"pipeline_schedule": name.lower()}),
    (r"(?i:(interleaved ?1f1b))", lambda _: {"pipeline_schedule": "interleaved1f1b"}),
    (r"pipeline schedule: vpp(\d+)", lambda n: {"pipeline_schedule": "interleaved1f1b", "vpp": int(n)}),
    (r"layout (E\S+)", lambda value: {"layout": value}),
    (r"MTP(\d)", lambda n: {"mtp": int(n)}),
    (r"HybridEP", lambda _: {"dispatcher": "hybridep"}),
    (r"EP overlap", lambda _: {"ep_overlap": True}),
    (r"full CG", lambda _: {"cuda_graph": "full_iteration"}),
)  # fmt: skip
"""Remarks of the column `other` that say what a column of the project holds."""


def columns_of_other(text: str) -> Found:
    """What the remarks in `text` say, column by column; those that no column holds stay in `other`."""
    found: Found = {}
    rest: list[str] = []
    for remark in re.split(r";", text):
        left = []
        for part in remark.split(","):
            columns = _remark(part.strip())
            if columns is None:
                left.append(part.strip())
            else:
                found |= columns
        if any(left):
            rest.append(", ".join(left))
    return found | ({"other": "; ".join(rest)} if rest else {})


def _remark(text: str) -> Found | None:
    backend = re.fullmatch(r"experts backend: (.+)", text)
    if backend is not None:
        name = backend[1].replace(" ", "_")
        return {"experts_backend": name} if name in _BACKENDS else {}
    for pattern, columns in _OTHER:
        matched = re.fullmatch(pattern, text)
        if matched is not None:
            return columns(matched[1] if matched.groups() else "")
    return None
