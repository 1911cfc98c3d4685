"""All engines of a comparison by the names that the command line takes, in the order of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_bench.errors import BadInputError
from moe_bench.harness.layer.bench import Bench
from moe_bench.harness.layer.engine import Engine
from moe_bench.harness.layer.megatron import engine_for, megatron_engines
from moe_bench.harness.layer.peers.compare import NUM_ROUNDS, comparable, compare_engines
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.harness.layer.peers.huggingface import hugging_face_engines
from moe_bench.harness.layer.peers.megablocks import MegaBlocks
from moe_bench.harness.layer.peers.textbook import Textbook
from moe_bench.results.layer_peers import LayerPeers
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.system import SystemSpec


def all_engines(system: SystemSpec) -> dict[str, Engine]:
    """Ours and Megatron-Core's first, then other people's."""
    ours: dict[str, Engine] = {engine.key: engine for engine in megatron_engines(system)}
    others: tuple[Engine, ...] = (*hugging_face_engines(), DeepSpeed(), MegaBlocks(), Textbook())
    return ours | {engine.name: engine for engine in others}


def chosen_engines(system: SystemSpec, names: Sequence[str]) -> dict[str, Engine]:
    """Those that `names` name, in the order of `all_engines`; all where there are no names.

    `hf` names every block of transformers, `hf_eager` one way to run their experts, `hf_mixtral` one block.

    Raises BadInputError for a name that nothing has.
    """
    engines = all_engines(system)
    if not names:
        return engines
    chosen: set[str] = set()
    for name in names:
        found = {key for key in engines if name in (key, *_groups(engines[key]))}
        if not found:
            known = sorted({*engines, *(group for one in engines.values() for group in _groups(one))})
            raise BadInputError(f"peer {name}: no such engine; known are {', '.join(known)}")
        chosen |= found
    return {key: engine for key, engine in engines.items() if key in chosen}


def _groups(engine: Engine) -> tuple[str, ...]:
    return getattr(engine, "groups", ())


def compare_peers(
    case: LayerCase,
    bench: Bench,
    *,
    names: Sequence[str] = (),
    num_rounds: int = NUM_ROUNDS,
    on_progress: Callable[[str], None] = lambda text: None,
) -> LayerPeers:
    """`compare_engines` of the named engines, or of all, over the engine that the case's kernels name."""
    own = engine_for(comparable(case)[0], bench.system)
    baseline = next(name for name, engine in all_engines(bench.system).items() if engine == own)
    chosen = chosen_engines(bench.system, (baseline, *names) if names else ())
    return compare_engines(
        case,
        chosen,
        baseline=baseline,
        device=bench.device,
        clock=bench.clock,
        num_rounds=num_rounds,
        on_progress=on_progress,
    )
