"""What the harness costs: blocks of its steps against those of a minimal Megatron-Core loop, in turn.

    python benchmarks/harness_overhead.py

Two processes train the same architecture on one CPU thread each. Pairs of blocks are interleaved, the order
changing from pair to pair, so that drift of the machine meets both. A block's time is the wall time of all
that happens in it: making batches, the steps, reading and checking losses, progress. Exits with 5 where the
upper end of the interval of the ratio is above the limit.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap

if TYPE_CHECKING:
    from moe_bench.spec.recipe import Recipe

NUM_PAIRS = 30
STEPS_PER_BLOCK = 2
LIMIT_RATIO = 1.02
SHORTEST_STEP_S = 0.1
"""Steps shorter than this would measure the machine's noise."""
GATE_EXIT_CODE = 5
FOLDER = Path(__file__).resolve().parent


class Loop:
    """A process that takes steps when asked, and says how long they took."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-W", "ignore", *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=FOLDER.parent,
        )

    def run(self, num_steps: int) -> float:
        """Wall time in seconds of `num_steps` steps."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process.stdin.write(f"{num_steps}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def harness_loop() -> None:
    """Body of the process that runs the harness on the minimal loop's architecture."""
    import torch

    from benchmarks import minimal_loop as minimal
    from moe_bench.harness.host_device import host_device
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.patches import patches
    from moe_bench.harness.process_groups import process_groups
    from moe_bench.harness.rank import batch_plan, build, wanted_patches
    from moe_bench.harness.routing import LoadCounter
    from moe_bench.harness.settings import settings_of
    from moe_bench.harness.trainer import Trainer, Watch
    from moe_bench.harness.workers import LOOPBACK
    from moe_bench.spec.rendezvous import Rendezvous

    torch.set_num_threads(1)
    arguments = megatron_arguments(recipe())
    settings = settings_of(arguments)
    rendezvous = Rendezvous(rank=0, world_size=1, local_rank=0, master_addr=LOOPBACK, master_port=0)
    with (
        host_device(),
        patches(wanted_patches(settings)),
        process_groups(rendezvous, backend="gloo", sizes=arguments.parallel_state),
    ):
        built = build(arguments, settings, device="cpu")
        num_steps = 1 + 2 * NUM_PAIRS * STEPS_PER_BLOCK
        trainer = Trainer(
            built,
            batch_plan(settings, vocab_size=minimal.VOCAB_SIZE, device="cpu"),
            LoadCounter(built.chunks, num_steps=num_steps, device="cpu"),
            rank=0,
            num_steps=num_steps,
            watch=Watch(now_s=time.perf_counter, on_step=lambda step: None, on_report=lambda report: None),
        )
        step = 0
        for line in sys.stdin:
            start_s = time.perf_counter()
            trainer.run(range(step, step + int(line)))
            print(time.perf_counter() - start_s, flush=True)
            step += int(line)


def recipe() -> Recipe:
    """The minimal loop's architecture and batch as a recipe."""
    from benchmarks import minimal_loop as minimal
    from moe_bench.spec.catalogue import find_recipe, recipes_root
    from moe_bench.spec.load import Loader
    from moe_bench.spec.recipe import OptimizerSpec, Overlap, Recompute, Routing
    from moe_bench.spec.scale import smoke_plan

    loader = Loader(root=recipes_root())
    asked = loader.recipe(find_recipe("qwen3_30b_a3b", loader))
    smoke = smoke_plan(asked, host=loader.system("cpu_host"), modified=()).recipe
    if smoke.model.moe is None or smoke.model.attention.kind != "gqa":
        raise RuntimeError("Qwen3 has experts and grouped-query attention")
    attention = smoke.model.attention.model_copy(
        update={
            "num_heads": minimal.NUM_HEADS,
            "num_query_groups": minimal.NUM_QUERY_GROUPS,
            "head_dim": minimal.HIDDEN_SIZE // minimal.NUM_HEADS,
            "qk_norm": "none",
        }
    )
    moe = smoke.model.moe.model_copy(
        update={
            "num_experts": minimal.NUM_EXPERTS,
            "top_k": minimal.TOP_K,
            "expert_ffn_hidden_size": minimal.EXPERT_FFN_HIDDEN_SIZE,
            "router": smoke.model.moe.router.model_copy(update={"aux_loss": "none"}),
        }
    )
    model = smoke.model.model_copy(
        update={
            "num_layers": minimal.NUM_LAYERS,
            "hidden_size": minimal.HIDDEN_SIZE,
            "vocab_size": minimal.VOCAB_SIZE,
            "attention": attention,
            "moe": moe,
        }
    )
    alone = {"num_gpus": 1, "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1}
    return smoke.model_copy(
        update={
            "model": model,
            "precision": "fp32",
            "seq_len": minimal.SEQ_LEN,
            "micro_batch_size": 1,
            "global_batch_size": minimal.NUM_MICRO_BATCHES,
            "parallel": smoke.parallel.model_copy(
                update=alone | {"expert_tensor": 1, "layout": None, "sequence_parallel": False}
            ),
            # Megatron-Core's own loop over experts, as in the minimal loop
            "kernels": smoke.kernels.model_copy(update={"grouped_gemm": False}),
            "routing": Routing(mode="random_logits"),
            "recompute": Recompute(),
            "overlap": Overlap(),
            "optimizer": OptimizerSpec(learning_rate=minimal.LEARNING_RATE),
        }
    )


def main() -> int:
    console = Console()
    minimal, harness = Loop("benchmarks/minimal_loop.py"), Loop("-m", "benchmarks.harness_overhead", "--loop")
    for loop in (minimal, harness):
        loop.run(STEPS_PER_BLOCK)
    pairs: list[tuple[float, float]] = []
    for index in track(range(NUM_PAIRS), description="pairs", console=console):
        order = (minimal, harness) if index % 2 == 0 else (harness, minimal)
        times_s = {loop: loop.run(STEPS_PER_BLOCK) / STEPS_PER_BLOCK for loop in order}
        pairs.append((times_s[minimal], times_s[harness]))
    for loop in (minimal, harness):
        loop.close()
    return show(console, pairs)


def show(console: Console, pairs: list[tuple[float, float]]) -> int:
    """Print the comparison; 0 if the harness keeps its limit."""
    minimal_s, harness_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = np.array([ours / theirs for theirs, ours in pairs])
    interval = bootstrap(
        (ratios,), np.median, confidence_level=0.95, method="percentile", random_state=0
    ).confidence_interval
    table = Table(title=f"{NUM_PAIRS} interleaved pairs of {STEPS_PER_BLOCK} steps")
    for heading in ("minimal loop, s/step", "harness, s/step", "median ratio", "95 % interval", "limit"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{minimal_s:.4f}",
        f"{harness_s:.4f}",
        f"{np.median(ratios):.4f}",
        f"{interval.low:.4f} to {interval.high:.4f}",
        f"{LIMIT_RATIO}",
    )
    console.print(table)
    if minimal_s < SHORTEST_STEP_S:
        console.print(f"steps are shorter than {SHORTEST_STEP_S} s; enlarge the model of minimal_loop.py")
        return GATE_EXIT_CODE
    return 0 if interval.high <= LIMIT_RATIO else GATE_EXIT_CODE


if __name__ == "__main__":
    if sys.argv[1:] == ["--loop"]:
        harness_loop()
    else:
        sys.exit(main())
