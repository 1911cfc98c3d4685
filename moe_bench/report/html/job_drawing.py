"""The GPUs of a job as nested boxes: pipeline stages, expert groups, nodes, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moe_bench.report.html.chart import WIDTH_PX
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe

GPU_SIZES_PX = (12, 10, 8, 7, 6, 5)
MAX_HEIGHT_PX = 280
"""GPUs are drawn as large as this height allows."""
_GAP_PX = 2
"""Between GPUs."""
_PADDING_PX = {"job": 1, "stage": 5, "group": 4, "node": 3}
_SPACE_PX = {"stage": 6, "group": 5, "node": 4}
"""Between boxes of one role."""
_HEADER_PX = 13
"""Line of text at the top of a stage."""
_LABELLED_WIDTH_PX, _LONE_WIDTH_PX = 184, 212
"""Of a stage, so that its label fits: one of many, two of which stand side by side, and the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A container of GPUs."""

    role: str
    """`stage`, `group` or `node`."""
    x_px: float
    y_px: float
    width_px: float
    height_px: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One rank of the job."""

    x_px: float
    y_px: float
    stage_fraction: float
    """0 for the first pipeline stage, 1 for the last."""
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDrawing:
    """Boxes and GPUs, with the sentences that explain them."""

    key: str
    title: str
    caption: str
    height_px: float
    boxes: tuple[Box, ...]
    gpus: tuple[Gpu, ...]
    gpu_px: int
    width_px: int = WIDTH_PX


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """Equal containers of one role, each around `num_children` of the level below."""

    role: str
    num_ranks: int
    num_children: int
    num_columns: int
    header_px: int
    child_width_px: float
    child_height_px: float
    space_px: int
    """Between the children."""
    min_width_px: float

    @property
    def padding_px(self) -> int:
        return _PADDING_PX[self.role]

    @property
    def width_px(self) -> float:
        columns = self.num_columns * (self.child_width_px + self.space_px) - self.space_px
        return max(self.min_width_px, columns + 2 * self.padding_px)

    @property
    def height_px(self) -> float:
        num_rows = -(-self.num_children // self.num_columns)
        rows = num_rows * (self.child_height_px + self.space_px) - self.space_px
        return self.header_px + rows + 2 * self.padding_px

    def child_offsets_px(self) -> Iterator[tuple[float, float]]:
        """Left upper corners of the children in this box."""
        for child in range(self.num_children):
            row, column = divmod(child, self.num_columns)
            yield (
                self.padding_px + column * (self.child_width_px + self.space_px),
                self.padding_px + self.header_px + row * (self.child_height_px + self.space_px),
            )


@dataclass(slots=True)
class _Drawn:
    """What has been placed so far."""

    boxes: list[Box] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)


def job_drawing(key: str, recipe: Recipe) -> JobDrawing:
    """The ranks of `recipe` in Megatron-Core's order tp-cp-ep-dp-pp (parallel_state.RankGenerator).

    In that order the ranks of a pipeline stage are consecutive, and within a stage each run of
    expert x expert-tensor ranks holds every expert once.
    """
    candidates = {gpu_px: _levels(recipe, gpu_px) for gpu_px in GPU_SIZES_PX}
    gpu_px = next(
        (size for size, levels in candidates.items() if levels[0].height_px <= MAX_HEIGHT_PX),
        GPU_SIZES_PX[-1],
    )
    levels = candidates[gpu_px]
    drawn = _Drawn()
    _place(drawn, recipe, levels, first_rank=0, x_px=0.0, y_px=0.0)
    return JobDrawing(
        key=key,
        title=f"Layout on {recipe.parallel.num_gpus} GPUs",
        caption=_caption(recipe, [level.role for level in levels]),
        height_px=levels[0].height_px,
        gpu_px=gpu_px,
        boxes=tuple(drawn.boxes),
        gpus=tuple(drawn.gpus),
    )


def _place(
    drawn: _Drawn, recipe: Recipe, levels: Sequence[_Level], *, first_rank: int, x_px: float, y_px: float
) -> None:
    """Put the container `levels[0]`, and all that is in it, at (x, y)."""
    parallel = recipe.parallel
    stage = first_rank // (parallel.num_gpus // parallel.pipeline)
    if not levels:
        fraction = stage / max(1, parallel.pipeline - 1)
        tip = f"rank {first_rank}, stage {stage}"
        drawn.gpus.append(Gpu(x_px=x_px, y_px=y_px, stage_fraction=fraction, tip=tip))
        return
    level = levels[0]
    if level.role != "job":
        drawn.boxes.append(
            Box(
                role=level.role,
                x_px=x_px,
                y_px=y_px,
                width_px=level.width_px,
                height_px=level.height_px,
                label=stage_label(recipe, stage) if level.header_px else "",
            )
        )
    child_ranks = level.num_ranks // level.num_children
    for child, (dx_px, dy_px) in enumerate(level.child_offsets_px()):
        _place(
            drawn,
            recipe,
            levels[1:],
            first_rank=first_rank + child * child_ranks,
            x_px=x_px + dx_px,
            y_px=y_px + dy_px,
        )


def _levels(recipe: Recipe, gpu_px: int) -> list[_Level]:
    """From the job down to the smallest container."""
    nested = [("job", recipe.parallel.num_gpus), *_containers(recipe)]
    label_width = _LABELLED_WIDTH_PX if recipe.parallel.pipeline > 1 else _LONE_WIDTH_PX
    levels: list[_Level] = []
    child_ranks, width, height, space = 1, float(gpu_px), float(gpu_px), _GAP_PX
    for index in reversed(range(len(nested))):
        role, num_ranks = nested[index]
        available = WIDTH_PX - sum(2 * _PADDING_PX[outer] for outer, _ in nested[: index + 1])
        num_children = num_ranks // child_ranks
        is_labelled = role == "stage" and index == 1
        level = _Level(
            role=role,
            num_ranks=num_ranks,
            num_children=num_children,
            num_columns=_num_columns(num_children, int((available + space) // (width + space)), role=role),
            header_px=_HEADER_PX if is_labelled else 0,
            child_width_px=width,
            child_height_px=height,
            space_px=space,
            min_width_px=label_width if is_labelled else 0,
        )
        levels.insert(0, level)
        child_ranks, width, height = num_ranks, level.width_px, level.height_px
        space = _SPACE_PX.get(role, 0)
    return levels


def _num_columns(num_children: int, at_most: int, *, role: str) -> int:
    """As many as fit, fewer where that fills every row; a node of eight is two rows of four."""
    at_most = max(1, at_most)
    if role == "node" and num_children > 4:
        at_most = min(at_most, -(-num_children // 2))
    if num_children <= at_most:
        return num_children
    full = [columns for columns in range(at_most, at_most // 2, -1) if num_children % columns == 0]
    return full[0] if full else at_most


def _containers(recipe: Recipe) -> list[tuple[str, int]]:
    """Role and ranks of every container, largest first; one that would cut across another is left out."""
    parallel = recipe.parallel
    candidates = [("stage", parallel.num_gpus // parallel.pipeline)]
    if recipe.model.moe is not None and parallel.expert * parallel.expert_tensor > 1:
        candidates.append(("group", parallel.expert * parallel.expert_tensor))
    candidates.append(("node", min(parallel.num_gpus, recipe.system.gpus_per_node)))
    nested: list[tuple[str, int]] = []
    for role, num_ranks in sorted(candidates, key=lambda one: -one[1]):
        outer = nested[-1][1] if nested else parallel.num_gpus
        if outer % num_ranks == 0:
            nested.append((role, num_ranks))
    return nested


def stage_label(recipe: Recipe, stage: int) -> str:
    """`stage 0: embedding, 15 layers`."""
    chunks: list[Chunk] = [chunk for chunk in recipe.chunks() if chunk.pipeline_rank == stage]
    num_layers = sum(len(chunk.layers) for chunk in chunks)
    parts = ["embedding"] if any(chunk.has_embedding for chunk in chunks) else []
    parts.append(f"{num_layers} layer{'s' if num_layers != 1 else ''}")
    parts += ["MTP"] if any(chunk.num_mtp_layers for chunk in chunks) else []
    parts += ["loss"] if any(chunk.has_loss for chunk in chunks) else []
    return f"stage {stage}: {', '.join(parts)}"


def _caption(recipe: Recipe, roles: Sequence[str]) -> str:
    parallel, moe, system = recipe.parallel, recipe.model.moe, recipe.system
    per_node = min(parallel.num_gpus, system.gpus_per_node)
    what = "GPU" if system.gpu is not None else "process"
    sentences = [f"Each small square is one {what}."]
    if "node" in roles:
        num_nodes = -(-parallel.num_gpus // per_node)
        sentences.append(f"Grey boxes: {num_nodes} node{'s' if num_nodes > 1 else ''} of {per_node}.")
    else:
        sentences.append(f"Nodes of {per_node} are not drawn, for stages or expert groups cut across them.")
    if parallel.pipeline > 1:
        chunks = f", each running its layers in {parallel.virtual_pipeline} chunks"
        sentences.append(
            f"Shades: {parallel.pipeline} pipeline stages{chunks if parallel.virtual_pipeline > 1 else ''}."
        )
    if "group" in roles and moe is not None:
        size = parallel.expert * parallel.expert_tensor
        holder = "GPU" if parallel.expert_tensor == 1 else f"{parallel.expert_tensor} GPUs"
        counts = " to ".join(map(str, moe.expert_counts))
        per_rank = " to ".join(str(number // parallel.expert) for number in moe.expert_counts)
        sentences.append(
            f"Outlined: expert groups of {size}, each with all {counts} experts, {per_rank} per {holder}."
        )
    return " ".join(sentences)
