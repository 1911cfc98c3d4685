"""Made-up records for tests of what reads them."""

from moe_bench.results.record import GitState, Implementations, Provenance, Record, Samples
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.derive_slice import slice_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import Plan, full_plan, smoke_plan

LOADER = Loader(root=recipes_root())
RECIPE = LOADER.recipe(LOADER.root / "qwen3_30b_a3b" / "h100_sxm_8g_bf16.yaml")


def smoke() -> Plan:
    return smoke_plan(RECIPE, host=LOADER.system("cpu_host"), modified=())


def full(modified: tuple[str, ...] = ()) -> Plan:
    return full_plan(RECIPE, modified=modified)


def one_rank() -> Plan:
    return slice_plan(RECIPE, fits=lambda _, __: True, modified=())


def record(
    plan: Plan | None = None,
    *,
    step_times_s: tuple[tuple[float, ...], ...] = ((0.1, 0.2, 0.1), (0.2, 0.1, 0.1)),
    started_at: str = "2026-11-22T07:00:00+00:00",
    job_id: str = "pid1",
    is_dirty: bool = False,
    repeat: int = 0,
    commit: str = "0123456789abcdef",
    dispatcher: str = "MoEAlltoAllTokenDispatcher",
) -> Record:
    num_ranks = len(step_times_s)
    return Record(
        plan=plan or smoke(),
        provenance=Provenance(
            started_at=started_at,
            command=("moe-bench", "run", "qwen3_30b_a3b"),
            job_id=job_id,
            repeat=repeat,
            git=GitState(commit=commit, branch="main", is_dirty=is_dirty),
            python_version="3.12.1",
            packages={"torch": "2.15.0"},
            hosts=tuple(f"node{rank}" for rank in range(num_ranks)),
            cpu_model=None,
            os="Linux",
            container=None,
            gpus=(),
            topology=None,
            nccl_version=None,
            cuda_version=None,
            environment={},
        ),
        samples=Samples(
            warmup_step_times_s=((1.0,),) * num_ranks,
            step_times_s=step_times_s,
            losses=(6.3, 6.2, 6.1, 6.0),
            grad_norms=(1.0, 1.0, 1.0, 1.0),
            peak_memory_bytes=tuple(2**30 + rank for rank in range(num_ranks)),
            tokens_per_expert=(((10, 30), (20, 20)),) * len(step_times_s[0]),
            energy_j=None,
            implementations=Implementations(
                attention="torch:masked",
                experts="torch:grouped_mm",
                dispatcher=dispatcher,
                normalization="RMSNorm",
                optimizer="DistributedOptimizer",
            ),
            patches=(),
        ),
    )
