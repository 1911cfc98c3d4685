"""The measurements that are wanted of one GPU, the most valuable first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_bench.results.calibration_tasks import OperationName
from moe_bench.spec.profile import ProfileTool
from moe_bench.spec.recipe import KernelFamily

Kind = Literal["tests", "ceilings", "slice", "layer", "calibrate", "profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TestsWish:
    """The tests that need a GPU: the numerics of every kernel before any of them is timed."""

    folder: str = "tests/harness"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateWish:
    """Single operations at the shapes of all recipes."""

    only: tuple[OperationName, ...] = ()
    """Empty takes all."""
    budget_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceWish:
    """One rank of a recipe in its place of the job."""

    recipe: str
    kernels: KernelFamily
    changes: tuple[str, ...] = ()
    repeat: int = 0
    profile: ProfileTool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWish:
    """One MoE layer of a recipe, or the layers of SonicMoE's figure 14 where there is none."""

    recipe: str | None
    experts: tuple[str, ...] = ()
    """Empty takes all that run, for the suite."""
    has_peers: bool = False
    is_sweep: bool = False
    held_s: float | None = None
    is_graphed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One measurement, and what its answer tells."""

    kind: Kind
    name: str
    question: str
    what: TestsWish | CalibrateWish | SliceWish | LayerWish

    @property
    def key(self) -> str:
        """Unique in the list."""
        return f"{self.kind} {self.name}".strip()


DEEPSEEK = "deepseek_v3/h100_sxm_1024g_bf16"
DEEPSEEK_FULL_RECOMPUTE = "deepseek_v3/h100_sxm_256g_bf16"
QWEN3_235B = "qwen3_235b_a22b/h100_sxm_256g_bf16"
QWEN3_30B = "qwen3_30b_a3b/h100_sxm_8g_bf16"
GPT_OSS = "gpt_oss_120b/h100_sxm_64g_bf16"
LAYERS = (
    (DEEPSEEK_FULL_RECOMPUTE, "DeepSeek-V3 at EP64"),
    ("qwen3_235b_a22b/h100_sxm_256g_bf16_deepep", "Qwen3-235B"),
    (QWEN3_30B, "Qwen3-30B at EP8"),
    (GPT_OSS, "GPT-OSS-120B"),
)
SLICES = (DEEPSEEK, QWEN3_235B, QWEN3_30B, GPT_OSS)
FP8_SLICES = ("deepseek_v3/h100_sxm_1024g_fp8_blockwise", "qwen3_30b_a3b/h100_sxm_16g_fp8_tensorwise")
SHORT = ("steps.num_warmup=3", "steps.num_timed=6")
HELD_S = 60.0
NUM_REPEATS = 3


def wishes(*, is_tiny: bool) -> tuple[Wish, ...]:
    """All of them; last the repeats, of which a toy has but one: its spread tells nothing."""
    repeated = [(recipe, repeat) for repeat in range(1, NUM_REPEATS) for recipe in SLICES]
    return (
        *_first(),
        *_slices("torch_native"),
        *_layers(),
        *_slices("transformer_engine"),
        *_rest(),
        *(
            _slice(recipe, "torch_native", question="the spread between runs", repeat=repeat)
            for recipe, repeat in repeated[: 1 if is_tiny else None]
        ),
    )


def _first() -> Iterator[Wish]:
    yield Wish(kind="tests", name="", question="whether every kernel is right", what=TestsWish())
    yield Wish(
        kind="ceilings",
        name="",
        question="what one large product, a copy and a launch reach in this session",
        what=CalibrateWish(only=("dense_gemm", "copy", "launch"), budget_s=30.0),
    )


def _slices(family: KernelFamily) -> Iterator[Wish]:
    for recipe in SLICES:
        yield _slice(recipe, family, question="compute of one rank, its bound on the full run, peak memory")


def _slice(recipe: str, family: KernelFamily, *, question: str, repeat: int = 0) -> Wish:
    again = f" repeat {repeat + 1}" if repeat else ""
    return Wish(
        kind="slice",
        name=f"{recipe} {family}{again}",
        question=question,
        what=SliceWish(recipe=recipe, kernels=family, changes=SHORT, repeat=repeat),
    )


def _layers() -> Iterator[Wish]:
    for recipe, label in LAYERS:
        yield Wish(
            kind="layer",
            name=f"{recipe} peers",
            question=f"where the time of {label}'s MoE layer goes, and what other engines take",
            what=LayerWish(recipe=recipe, experts=("torch_native",), has_peers=True),
        )
    yield Wish(
        kind="layer",
        name="sonicmoe",
        question="the twelve layers of SonicMoE's figure 14 on every family",
        what=LayerWish(recipe=None),
    )


def _rest() -> Iterator[Wish]:
    yield Wish(
        kind="calibrate",
        name="",
        question="rates of every operation, which the projection reads",
        what=CalibrateWish(budget_s=240.0),
    )
    yield Wish(
        kind="layer",
        name=f"{DEEPSEEK_FULL_RECOMPUTE} held",
        question="how much slower a layer is in a minute than in a burst, and captured as a graph",
        what=LayerWish(
            recipe=DEEPSEEK_FULL_RECOMPUTE, experts=("torch_native",), held_s=HELD_S, is_graphed=True
        ),
    )
    yield Wish(
        kind="layer",
        name=f"{QWEN3_30B} sweep",
        question="what uneven loads cost",
        what=LayerWish(recipe=QWEN3_30B, experts=("torch_native",), is_sweep=True),
    )
    for recipe in FP8_SLICES:
        yield _slice(recipe, "transformer_engine", question="what FP8 gains")
    yield Wish(
        kind="profile",
        name=DEEPSEEK,
        question="every kernel of a step",
        what=SliceWish(recipe=DEEPSEEK, kernels="torch_native", changes=SHORT, profile="torch"),
    )
    yield Wish(
        kind="slice",
        name=f"{DEEPSEEK_FULL_RECOMPUTE} torch_native parts",
        question="full recomputation; how long the layer that was held alone takes within a step",
        what=SliceWish(
            recipe=DEEPSEEK_FULL_RECOMPUTE, kernels="torch_native", changes=SHORT, profile="parts"
        ),
    )
    yield _slice("qwen3_30b_a3b/h100_sxm_8g_bf16_quack", "quack", question="rows that nobody permutes")
