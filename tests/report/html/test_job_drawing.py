"""Every GPU stands once, in its node, its expert group and its stage, and nothing leaves the drawing."""

from collections import Counter
from itertools import pairwise

import pytest

from moe_bench.report.html.job_drawing import Box, JobDrawing, job_drawing
from moe_bench.spec.catalogue import recipe_paths
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from tests.report.pages import recipe
from tests.results.records import LOADER

NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in recipe_paths(LOADER.root))


def contains(box: Box, x_px: float, y_px: float) -> bool:
    return box.x_px <= x_px < box.x_px + box.width_px and box.y_px <= y_px < box.y_px + box.height_px


def ranks_by_box(drawing: JobDrawing, role: str) -> list[list[int]]:
    """The ranks inside each box of a role, by where they are drawn."""
    boxes = [box for box in drawing.boxes if box.role == role]
    return [
        [rank for rank, gpu in enumerate(drawing.gpus) if contains(box, gpu.x_px, gpu.y_px)] for box in boxes
    ]


def blocks(num_gpus: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, num_gpus, size)]


@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_is_drawn_once_inside_the_drawing(name: str) -> None:
    drawing = job_drawing("x", recipe(name))
    assert len(drawing.gpus) == recipe(name).parallel.num_gpus
    places = Counter((gpu.x_px, gpu.y_px) for gpu in drawing.gpus)
    assert set(places.values()) == {1}
    assert max(box.x_px + box.width_px for box in drawing.boxes) <= drawing.width_px
    assert max(box.y_px + box.height_px for box in drawing.boxes) <= drawing.height_px


@pytest.mark.parametrize("name", NAMES)
def test_boxes_hold_the_ranks_of_their_stage_group_and_node(name: str) -> None:
    drawn, asked = job_drawing("x", recipe(name)), recipe(name)
    num_gpus = asked.parallel.num_gpus
    assert ranks_by_box(drawn, "stage") == blocks(num_gpus, num_gpus // asked.parallel.pipeline)
    assert ranks_by_box(drawn, "node") == blocks(num_gpus, min(num_gpus, asked.system.gpus_per_node))
    num_in_group = asked.parallel.expert * asked.parallel.expert_tensor
    # a GPU that has every expert is its own group
    assert ranks_by_box(drawn, "group") == (blocks(num_gpus, num_in_group) if num_in_group > 1 else [])


def with_parallel(**sizes: int) -> Recipe:
    base = recipe("qwen3_30b_a3b")
    return base.model_copy(update={"parallel": ParallelSpec(**sizes)})


def test_stages_smaller_than_a_node_stand_inside_it() -> None:
    drawing = job_drawing("x", with_parallel(num_gpus=8, pipeline=4, expert=2))
    assert [box.role for box in drawing.boxes[:2]] == ["node", "stage"]
    assert ranks_by_box(drawing, "stage") == blocks(8, 2)
    assert [gpu.stage_fraction for gpu in drawing.gpus] == pytest.approx(
        [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1]
    )


def test_containers_that_would_cut_across_others_are_left_out_and_named() -> None:
    drawing = job_drawing("x", with_parallel(num_gpus=24, pipeline=2, expert=4))
    assert {box.role for box in drawing.boxes} == {"stage", "group"}
    assert "Nodes of 8 are not drawn" in drawing.caption


def test_the_caption_counts_nodes_stages_and_experts() -> None:
    caption = job_drawing("x", recipe("deepseek_v3")).caption
    assert "32 nodes of 8" in caption
    assert "4 pipeline stages, each running its layers in 8 chunks" in caption
    assert "expert groups of 64, each with all 256 experts, 4 per GPU" in caption


def test_labels_name_what_a_stage_holds() -> None:
    labels = [box.label for box in job_drawing("x", recipe("deepseek_v3")).boxes if box.role == "stage"]
    assert labels[0] == "stage 0: embedding, 15 layers"
    assert labels[-1] == "stage 3: 14 layers, loss"


def test_shades_grow_with_the_stage() -> None:
    fractions = [gpu.stage_fraction for gpu in job_drawing("x", recipe("deepseek_v3")).gpus]
    assert all(before <= after for before, after in pairwise(fractions))
