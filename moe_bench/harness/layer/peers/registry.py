"""All engines of a comparison by the names that `--peers` takes, in the order in which they are shown."""

from __future__ import annotations

from moe_bench.errors import BadInputError
from moe_bench.harness.layer.engine import Engine
from moe_bench.harness.layer.megatron import megatron_engines
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.harness.layer.peers.huggingface import hugging_face_engines
from moe_bench.harness.layer.peers.megablocks import MegaBlocks
from moe_bench.harness.layer.peers.textbook import Textbook
from moe_bench.spec.system import SystemSpec

SEQUENTIAL = "sequential"


def all_engines(system: SystemSpec) -> dict[str, Engine]:
    """Ours and Megatron-Core's first, then other people's."""
    ours: dict[str, Engine] = {
        engine.family if engine.is_grouped else SEQUENTIAL: engine for engine in megatron_engines(system)
    }
    others: tuple[Engine, ...] = (*hugging_face_engines(), DeepSpeed(), MegaBlocks(), Textbook())
    return ours | {engine.name: engine for engine in others}


def chosen_engines(system: SystemSpec, names: str | None) -> dict[str, Engine]:
    """Those that a list such as `hf_eager,textbook` names; all where it is None.

    `hf` names every block of transformers, `hf_eager` one way to run their experts, `hf_mixtral` one block.

    Raises BadInputError for a name that nothing has.
    """
    engines = all_engines(system)
    if names is None:
        return engines
    chosen: set[str] = set()
    for name in names.split(","):
        found = {key for key in engines if name in (key, *_groups(engines[key]))}
        if not found:
            known = sorted({*engines, *(group for one in engines.values() for group in _groups(one))})
            raise BadInputError(f"--peers {name}: no such engine; known are {', '.join(known)}")
        chosen |= found
    return {key: engine for key, engine in engines.items() if key in chosen}


def _groups(engine: Engine) -> tuple[str, ...]:
    return getattr(engine, "groups", ())
