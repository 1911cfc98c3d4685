"""When CUDA graphs of a step are captured, and what is called around a capture, in which order."""

from __future__ import annotations

import inspect
import socket
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from megatron.core import full_cuda_graph, num_microbatches_calculator
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import cuda_graphs

from moe_bench.harness.batches import BatchPlan
from moe_bench.harness.build import Training, random_tracker
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.requirements import require_supported
from moe_bench.harness.session import run
from moe_bench.harness.step_graphs import step_graphs
from moe_bench.results.record import Samples
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import CudaGraphs, KernelFamily, Recipe, Routing, Steps, TokenDrop
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.system import SystemSpec
from tests.harness.toys import laid_out, parity_recipe, smoke_recipe

Kind = Literal["local", "transformer_engine", "full_iteration"]
PLAN = BatchPlan(
    seed=1,
    vocab_size=8,
    seq_len=16,
    micro_batch_size=2,
    num_micro_batches=4,
    data_rank=0,
    data_size=3,
    context_group=None,
    device="cuda",
)


def recorder(real: type, said: list[str], **answers: object) -> Any:
    """In the place of an object of `real`: says what is called on it, with arguments that `real` takes."""

    class Recorder:
        def __init__(self, *args: object, **options: object) -> None:
            inspect.signature(real).bind(*args, **options)
            said.append("init")

        def __getattr__(self, name: str) -> Any:
            def call(*args: object, **options: object) -> object:
                inspect.signature(getattr(real, name)).bind(self, *args, **options)
                said.append(" ".join((name, *(f"{key}={value}" for key, value in options.items()))))
                return answers.get(name)

            return call

    return Recorder


def training(said: list[str], kind: str, *, gathers: bool = True) -> Training:
    class Chunk(recorder(DistributedDataParallel, said)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ddp_config = SimpleNamespace(overlap_param_gather=gathers)

    config: Any = SimpleNamespace(
        cuda_graph_impl=kind, cuda_graph_warmup_steps=3, cuda_graph_use_single_mempool=True
    )
    return Training(config=config, chunks=(Chunk(),), optimizer=None)


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Transformer Engine's helper is asked, in order."""
    said: list[str] = []
    real = cuda_graphs.TECudaGraphHelper
    answers = {"capture_finished": False, "graphs_created": True}
    monkeypatch.setattr(cuda_graphs, "TECudaGraphHelper", recorder(real, said, **answers))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    return said


def test_layers_are_captured_after_the_warm_up_with_the_hooks_of_weights_off(helped: list[str]) -> None:
    with step_graphs(training(helped, "transformer_engine"), PLAN) as graphs:
        assert num_microbatches_calculator.get_num_microbatches() == PLAN.num_micro_batches
        assert [graphs.capture_before(step) for step in range(3)] == [False] * 3
        assert helped == ["init"]
        assert graphs.capture_before(3)
        assert not graphs.capture_before(4)
        assert graphs.schedule is None
    assert helped[1:] == [
        "capture_finished",
        "disable_forward_pre_hook param_sync=False",
        "create_cudagraphs",
        "enable_forward_pre_hook",
        "cuda_graph_set_manual_hooks",
        "graphs_created",
        "delete_cuda_graphs",
    ]
    with pytest.raises(AttributeError):
        num_microbatches_calculator.get_num_microbatches()


def test_without_overlapped_gathering_there_are_no_hooks_to_switch(helped: list[str]) -> None:
    with step_graphs(training(helped, "transformer_engine", gathers=False), PLAN) as graphs:
        assert graphs.capture_before(3)
    assert helped[1:] == ["capture_finished", "create_cudagraphs", "graphs_created", "delete_cuda_graphs"]


def test_a_run_that_fails_deletes_its_graphs_too(helped: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), step_graphs(training(helped, "transformer_engine"), PLAN):
        raise ZeroDivisionError
    assert helped[-1] == "delete_cuda_graphs"


def test_the_whole_iteration_is_captured_by_what_stands_in_for_the_schedule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    real = full_cuda_graph.FullCudaGraphWrapper
    monkeypatch.setattr(full_cuda_graph, "FullCudaGraphWrapper", recorder(real, said))
    monkeypatch.setattr("moe_bench.harness.step_graphs.get_forward_backward_func", lambda: print)
    full_cuda_graph.StaticBufferLoader.static_buffers["training"].append({})
    with step_graphs(training(said, "full_iteration"), PLAN) as graphs:
        assert isinstance(graphs.schedule, full_cuda_graph.FullCudaGraphWrapper)
        assert not any(graphs.capture_before(step) for step in range(8))
    assert said == ["init", "reset_cuda_graph"]
    assert full_cuda_graph.StaticBufferLoader.static_buffers == {"training": [], "validation": []}


def test_local_graphs_are_left_to_the_schedule_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cuda_graphs, "delete_cuda_graphs", lambda: said.append("delete"))
    with step_graphs(training(said, "local"), PLAN) as graphs:
        assert graphs.schedule is None
        assert not any(graphs.capture_before(step) for step in range(8))
        assert said == []
    assert said == ["delete"]


def test_a_graph_gets_random_states_that_it_can_advance() -> None:
    assert random_tracker(megatron_arguments(smoke_recipe("qwen3_30b_a3b"))) == {}
    loader = Loader(root=recipes_root())
    engine = loader.recipe(find_recipe("qwen3_30b_a3b/h100_sxm_16g_bf16", loader))
    arguments = megatron_arguments(engine)
    asked = ("cuda_graph_impl", "cuda_graph_modules", "cuda_graph_warmup_steps")
    assert [arguments.transformer[name] for name in asked] == [
        "transformer_engine",
        ("moe_router", "moe_preprocess"),
        3,
    ]
    assert random_tracker(arguments) == {
        "te_rng_tracker": True,
        "use_cudagraphable_rng": False,
        "force_reset_rng": True,
    }
    inspect.signature(model_parallel_cuda_manual_seed).bind(1, **random_tracker(arguments))


def on_this_gpu(kind: Kind) -> Recipe:
    """Four layers in BF16, with every token kept in experts padded to what round robin gives them."""
    loader = Loader(root=recipes_root())
    systems = [loader.system(path.stem) for path in sorted((recipes_root() / "systems").glob("*.yaml"))]
    name = torch.cuda.get_device_name()
    mine = [one for one in systems if one.gpu is not None and one.gpu.device_name == name]
    if not mine:
        pytest.skip(f"no file of recipes/systems names {name}")
    return graphed(mine[0], kind)


def graphed(system: SystemSpec, kind: Kind) -> Recipe:
    toy = parity_recipe("qwen3_30b_a3b")
    family: KernelFamily = "transformer_engine" if kind == "transformer_engine" else "torch_native"
    return laid_out(
        toy,
        parallel={},
        system=system,
        precision="bf16",
        kernels=toy.kernels.model_copy(update={"family": family, "attention": "auto"}),
        routing=Routing(mode="round_robin"),
        token_drop=TokenDrop(capacity_factor=1.0, pad_to_capacity=True),
        cuda_graphs=CudaGraphs(implementation=kind),
        steps=Steps(num_warmup=4, num_timed=4),
    )


KINDS: tuple[Kind, ...] = ("local", "transformer_engine", "full_iteration")


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_that_a_gpu_is_given_are_legal_and_supported(kind: Kind) -> None:
    recipe = graphed(Loader(root=recipes_root()).system("h100_sxm"), kind)
    require_supported(megatron_arguments(recipe))


@pytest.mark.gpu("a step is captured on a GPU alone")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_are_replayed_learn_what_launched_ones_do(kind: Kind) -> None:
    recipe = on_this_gpu(kind)
    if recipe.kernels.family == "transformer_engine":
        pytest.importorskip("transformer_engine")
    launched = samples(recipe.model_copy(update={"cuda_graphs": CudaGraphs()}))
    replayed = samples(recipe)
    assert replayed.losses == pytest.approx(launched.losses, rel=1e-3)
    assert replayed.losses[-1] < replayed.losses[0]
    assert replayed.tokens_per_expert == launched.tokens_per_expert


def samples(recipe: Recipe) -> Samples:
    alone = Rendezvous(rank=0, world_size=1, local_rank=0, master_addr="localhost", master_port=free_port())
    outcome = run(megatron_arguments(recipe), rendezvous=alone, on_report=lambda report: None)
    assert outcome is not None
    return outcome.samples


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
    return port
