"""Layers divide over pipeline ranks and their virtual stages, with the MTP module where it can run."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.pipeline import LayoutError, StageCountError, expand_layout, pipeline_chunks
from moe_bench.spec.recipe import Recipe

_CONFIG = "megatron/core/transformer/transformer_config.py"
_LAYOUT = "megatron/core/transformer/pipeline_parallel_layer_layout.py"


@rule(
    "the stages of a layout string are the virtual stages of all ranks",
    "megatron/training/arguments.py:911",
    "megatron/training/arguments.py:968",
    "megatron/training/arguments.py:972",
    f"{_LAYOUT}:40",
    f"{_CONFIG}:1974",
)
def layout_stages(recipe: Recipe) -> Iterator[Found]:
    stages = stages_of(recipe)
    if stages and len(stages) != recipe.parallel.num_chunks:
        values, _, fix = str(StageCountError(len(stages), recipe.parallel)).rpartition("; ")
        yield "parallel.layout", values, fix


@rule(
    "every layer needs exactly one stage",
    "megatron/training/arguments.py:963",
    f"{_LAYOUT}:94",
    f"{_LAYOUT}:97",
    f"{_LAYOUT}:102",
    f"{_LAYOUT}:105",
    f"{_LAYOUT}:106",
    f"{_LAYOUT}:111",
    f"{_LAYOUT}:315",
    f"{_CONFIG}:2006",
    f"{_CONFIG}:2025",
    f"{_CONFIG}:2036",
    f"{_CONFIG}:2044",
    f"{_CONFIG}:2058",
    f"{_CONFIG}:2077",
    f"{_CONFIG}:2090",
    f"{_CONFIG}:2103",
    "megatron/core/transformer/transformer_block.py:150",
    "megatron/core/transformer/transformer_block.py:169",
)
def pipeline_layers(recipe: Recipe) -> Iterator[Found]:
    error = _layout_error(recipe)
    if error is not None and not isinstance(error, StageCountError):
        values, _, fix = str(error).rpartition("; ")
        yield "parallel.layout" if recipe.parallel.layout is not None else "parallel.pipeline", values, fix


@rule("one split of the layers at a time", f"{_CONFIG}:1946", f"{_CONFIG}:1929")
def one_split(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    ends = parallel.num_layers_first_stage or parallel.num_layers_last_stage
    counts = parallel.embedding_counts_as_layer or parallel.loss_counts_as_layer
    if parallel.layout is not None and (ends or counts):
        yield "parallel.layout", "a layout string beside other ways to split", "keep the layout alone"
    elif ends and counts:
        yield (
            "parallel.num_layers_first_stage" if parallel.num_layers_first_stage else
            "parallel.num_layers_last_stage",
            "a stage's own number of layers, with the embedding or the loss counted as a layer",
            "write 0, or let neither count",
        )  # fmt: skip


@rule(
    "virtual stages are chunks of a pipeline rank",
    "megatron/training/arguments.py:968",
    "megatron/training/arguments.py:972",
    "megatron/core/parallel_state.py:829",
)
def virtual_stages_need_a_pipeline(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            "parallel.virtual_pipeline",
            f"{parallel.virtual_pipeline} virtual stages, PP1",
            "write 1, or raise pipeline",
        )


@rule(
    "MTP modules stand together, after the decoder, in the last virtual stage of one rank",
    f"{_LAYOUT}:116",
    f"{_LAYOUT}:122",
    f"{_LAYOUT}:128",
)
def mtp_stage(recipe: Recipe) -> Iterator[Found]:
    stages = stages_of(recipe)
    letters = "".join(stages)
    with_mtp = [index for index, stage in enumerate(stages) if "m" in stage]
    last_virtual = len(stages) - recipe.parallel.pipeline
    if with_mtp and "t" in letters[letters.index("m") :]:
        yield "parallel.layout", "a decoder layer after an MTP layer", "move the letters m behind every t"
    elif len(with_mtp) > 1:
        yield "parallel.layout", f"letters m in stages {with_mtp}", "put all in one stage"
    elif with_mtp and with_mtp[0] < last_virtual:
        yield (
            "parallel.layout",
            f"letter m in stage {with_mtp[0]}, the last virtual stages begin at {last_virtual}",
            "move it to one of the last stages",
        )


@rule(
    "the layout forbids it, and where it does not, the schedule hangs",
    f"{_LAYOUT}:132",
    f"{_LAYOUT}:122",
)
def mtp_not_on_the_first_rank(recipe: Recipe) -> Iterator[Found]:
    pipeline = recipe.parallel.pipeline
    if pipeline > 1 and any("m" in stage for stage in stages_of(recipe)[::pipeline]):
        yield (
            "parallel.layout",
            "an MTP layer on the first pipeline rank",
            "move the letter m to another rank",
        )


@rule("the model's authors published no more", "arXiv:2412.19437, section 2.2")
def mtp_of_the_model(recipe: Recipe) -> Iterator[Found]:
    if recipe.num_mtp_layers > recipe.model.num_mtp_layers:
        yield (
            "num_mtp_layers",
            f"{recipe.num_mtp_layers} MTP layers, the model has {recipe.model.num_mtp_layers}",
            f"write at most {recipe.model.num_mtp_layers}",
        )


@rule("MTP shifts the token ids, which only plain RoPE takes", "megatron/training/arguments.py:857")
def mtp_position_embedding(recipe: Recipe) -> Iterator[Found]:
    model = recipe.model
    if recipe.num_mtp_layers and model.attention.kind == "gqa" and model.rope.scaling is not None:
        yield "num_mtp_layers", f"{recipe.num_mtp_layers} MTP layers, YaRN positions", "write 0"


RULES = (
    layout_stages, pipeline_layers, one_split, virtual_stages_need_a_pipeline, mtp_stage,
    mtp_not_on_the_first_rank, mtp_of_the_model, mtp_position_embedding,
)  # fmt: skip


def _layout_error(recipe: Recipe) -> LayoutError | None:
    """Why the layers cannot be divided as the recipe says."""
    try:
        pipeline_chunks(
            recipe.parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
        )
    except LayoutError as error:
        return error
    return None


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of the layout string; none without one, or where it cannot be read."""
    try:
        return () if recipe.parallel.layout is None else expand_layout(recipe.parallel.layout)
    except LayoutError:
        return ()
