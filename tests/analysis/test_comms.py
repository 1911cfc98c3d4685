"""Collective bytes by hand, and what must hold for every layout."""

from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from moe_bench.analysis.collectives import Collective, Group, Phase, group_size, sent_bytes
from moe_bench.analysis.comms import Transfer, step_transfers, total_bytes
from moe_bench.analysis.params import rank_params
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Overlap, Recipe, Recompute, TokenDrop
from tests.analysis.conftest import RecipeMaker

FULL = Recompute(granularity="full", method="uniform", num_layers=1)
TOKENS = 4096
HIDDEN = 7168
ROW = 2 * HIDDEN
"""Bytes of one token's hidden state."""
SHIPPED = [str(path.relative_to(recipes_root()).with_suffix("")) for path in recipe_paths(recipes_root())]


def bytes_of(transfers: Iterable[Transfer], chosen: Callable[[Transfer], bool]) -> int:
    return sum(transfer.num_bytes for transfer in transfers if chosen(transfer))


@pytest.fixture(scope="module")
def stage(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> Recipe:
    """DeepSeek-V3 with 60 layers on 256 GPUs, PP4 EP64: 15 layers a stage, the first 3 dense."""
    return make_recipe(
        models["deepseek_v3"].model_copy(update={"num_layers": 60}),
        ParallelSpec(num_gpus=256, pipeline=4, expert=64),
        recompute=FULL,
        global_batch_size=8 * 64,
    )


def test_dispatch_and_combine_match_a_hand_count(stage: Recipe) -> None:
    transfers = step_transfers(stage, 0)
    # 8 copies of 4096 tokens out and back, and a probability with each copy out
    per_layer = 2 * TOKENS * 8 * ROW + TOKENS * 8 * 4
    assert per_layer == 939_655_168
    for phase in (Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD):
        by_op = total_bytes((t for t in transfers if t.phase is phase), by=lambda t: (str(t.op),))
        carried = by_op["all_to_all",]
        assert carried == 8 * 12 * per_layer == 8 * 11_275_862_016


def test_token_counts_are_gathered_forward_and_again_where_a_layer_is_recomputed(stage: Recipe) -> None:
    counts = [t for t in step_transfers(stage, 0) if t.what == "token counts"]
    # 256 numbers of 8 bytes from each of 64 ranks, in 12 layers of 8 micro batches
    assert 64 * 256 * 8 * 12 == 1_572_864
    by_phase = total_bytes(counts, by=lambda transfer: (str(transfer.phase),))
    assert by_phase == {("forward",): 8 * 1_572_864, ("recompute",): 8 * 1_572_864}


def test_pipeline_messages_match_a_hand_count(stage: Recipe) -> None:
    for rank, num_neighbours in ((0, 1), (1, 2), (3, 1)):
        for op in (Collective.SEND, Collective.RECV):
            carried = bytes_of(step_transfers(stage, rank), lambda t, op=op: t.op is op)
            assert carried == num_neighbours * 8 * 58_720_256


def test_gradients_and_parameters_of_a_stage_match_its_parameters(stage: Recipe) -> None:
    dense = rank_params(stage, 0).dense
    assert dense == pytest.approx(5.473e9, rel=1e-4)
    transfers = step_transfers(stage, 0)
    assert bytes_of(transfers, lambda t: t.phase is Phase.GRADIENT_SYNC) == 4 * dense
    # experts have one replica only, so theirs move nothing; the dense ones are gathered twice
    assert bytes_of(transfers, lambda t: t.phase is Phase.PARAMETER_SYNC) == 2 * 2 * dense
    overlapped = stage.model_copy(update={"overlap": Overlap(param_gather=True)})
    once = bytes_of(step_transfers(overlapped, 0), lambda t: t.phase is Phase.PARAMETER_SYNC)
    assert once == 2 * dense


def test_tensor_parallel_exchanges_of_an_expert_layer_match_a_hand_count(stage: Recipe) -> None:
    parallel = ParallelSpec(num_gpus=512, tensor=2, sequence_parallel=True, pipeline=4, expert=64)
    recipe = stage.model_copy(update={"parallel": parallel, "recompute": Recompute()})
    layer = [t for t in step_transfers(recipe, 0) if t.place == "decoder.3" and t.phase is Phase.FORWARD]
    per_call = {(t.op, t.group, t.what): t.num_bytes // t.num_calls for t in layer}
    assert per_call == {
        (Collective.ALL_GATHER, Group.TENSOR, "query latent"): TOKENS * 1536 * 2,
        (Collective.ALL_GATHER, Group.TENSOR, "key-value latent"): TOKENS * 512 * 2,
        (Collective.ALL_GATHER, Group.TENSOR, "rotary key"): TOKENS * 64 * 2,
        (Collective.REDUCE_SCATTER, Group.TENSOR, "attention output"): TOKENS * ROW,
        (Collective.ALL_REDUCE, Group.TENSOR_CONTEXT, "tokens per expert"): 256 * 8,
        (Collective.ALL_TO_ALL, Group.EXPERT, "dispatch"): TOKENS // 2 * 8 * ROW,
        (Collective.ALL_TO_ALL, Group.EXPERT, "probabilities"): TOKENS // 2 * 8 * 4,
        (Collective.ALL_TO_ALL, Group.EXPERT, "combine"): TOKENS // 2 * 8 * ROW,
        (Collective.ALL_GATHER, Group.EXPERT_TENSOR_EXPERT, "token counts"): 64 * 256 * 8,
        (Collective.ALL_GATHER, Group.TENSOR, "shared expert input"): TOKENS * ROW,
        (Collective.REDUCE_SCATTER, Group.TENSOR, "shared expert output"): TOKENS * ROW,
    }


@pytest.mark.parametrize(
    ("comm", "forward", "backward"),
    [
        # K = 2048 tokens x 8 groups x (64 + 64) channels x 2 bytes; CP4
        ("p2p", {"send": 3, "recv": 3}, {"send": 6, "recv": 6}),
        ("allgather", {"all_gather": 4}, {"all_gather": 4, "reduce_scatter": 4}),
    ],
)
def test_context_parallel_exchanges_match_hand_counts(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    comm: str,
    forward: dict[str, int],
    backward: dict[str, int],
) -> None:
    parallel = ParallelSpec.model_validate({"num_gpus": 8, "context": 4, "context_comm": comm, "expert": 8})
    recipe = make_recipe(models["gpt_oss_20b"], parallel, seq_len=8192, global_batch_size=2)
    keys_and_values = 2048 * 8 * (64 + 64) * 2
    for phase, expected in ((Phase.FORWARD, forward), (Phase.BACKWARD, backward)):
        context = [
            t
            for t in step_transfers(recipe, 0)
            if t.group is Group.CONTEXT and t.place == "decoder.0" and t.phase is phase
        ]
        carried = {op: size for (op,), size in total_bytes(context, by=lambda t: (str(t.op),)).items()}
        assert carried == {op: times * keys_and_values for op, times in expected.items()}


def test_heads_change_places_with_tokens_in_all_to_all_context_parallelism(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=4, context=4, context_comm="a2a")
    recipe = make_recipe(models["mixtral_8x7b"], parallel, global_batch_size=1)
    forward = [t for t in step_transfers(recipe, 0) if t.group is Group.CONTEXT and t.phase is Phase.FORWARD]
    carried = {t.what: t.num_bytes for t in forward if t.place == "decoder.0"}
    # 1024 tokens, 32 heads and 8 groups of 128 channels
    query, keys = 1024 * 32 * 128 * 2, 1024 * 8 * 128 * 2
    assert carried == {"queries": query, "keys": keys, "values": keys, "attention output": query}


def test_padding_to_capacity_fixes_the_rows_and_needs_no_counts(stage: Recipe) -> None:
    padded = stage.model_copy(
        update={"token_drop": TokenDrop(capacity_factor=1.25, pad_to_capacity=True), "recompute": Recompute()}
    )
    layer = [t for t in step_transfers(padded, 1) if t.place == "decoder.20" and t.phase is Phase.FORWARD]
    # 128 copies per expert and sender, times 1.25
    rows = 256 * 160
    assert {t.what: t.num_bytes // t.num_calls for t in layer} == {
        "dispatch": rows * ROW,
        "probabilities": rows * 4,
        "combine": rows * ROW,
    }


@pytest.mark.parametrize(
    ("strategy", "num_reductions"), [("optim", 1), ("optim_grads", 16), ("optim_grads_params", 16)]
)
def test_megatron_fsdp_reduces_and_gathers_as_its_strategy_says(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, strategy: str, num_reductions: int
) -> None:
    model = models["mixtral_8x7b"]
    parallel = ParallelSpec.model_validate(
        {"num_gpus": 16, "expert": 8, "data_sharding": "megatron_fsdp", "fsdp_strategy": strategy}
    )
    recipe = make_recipe(model, parallel)
    by_phase = total_bytes(step_transfers(recipe, 0), by=lambda t: (str(t.phase), str(t.group)))
    # 16 ranks hold whole rows of 4,096: of 32,000 for embedding and head each and 1 for the last norm, and of
    # 6,144 + 4,096 for attention, 8 for the router and 2 for the norms of a layer
    ends, layer = 2 * 32_000 + 1, 6144 + 4096 + 8 + 2
    if strategy == "optim_grads_params":
        ends, layers = 4001 * 16 * 4096, 32 * 641 * 16 * 4096
    else:
        ends, layers = 0, (ends + 32 * layer + 15) // 16 * 16 * 4096
    # an expert's three matrices, which 2 ranks divide evenly
    experts = rank_params(recipe, 0).expert
    assert by_phase["gradient sync", "DPxCP"] == num_reductions * 4 * (ends + layers)
    assert by_phase["gradient sync", "EDP"] == num_reductions * 4 * experts
    # BF16, for both passes of 16 micro batches where layers are freed in between
    num_gathers = 2 * 16 if strategy == "optim_grads_params" else 1
    assert by_phase["parameter sync", "DPxCP"] == 2 * (ends + num_gathers * layers)
    assert by_phase["parameter sync", "EDP"] == 2 * num_gathers * experts


def test_copies_of_the_embedding_are_summed_over_their_stages(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=16, pipeline=2, expert=8)
    model = models["olmoe_1b_7b"].model_copy(update={"tied_embeddings": True})
    recipe = make_recipe(model, parallel)
    for rank in (0, 1):
        (copies,) = (t for t in step_transfers(recipe, rank) if t.group is Group.EMBEDDING)
        assert (copies.num_bytes, copies.group_size) == (4 * model.vocab_size * model.hidden_size, 2)


@pytest.mark.parametrize(
    ("op", "size", "sent"),
    [
        (Collective.ALL_GATHER, 4, 75),
        (Collective.REDUCE_SCATTER, 4, 75),
        (Collective.ALL_TO_ALL, 4, 75),
        (Collective.ALL_REDUCE, 4, 150),
        (Collective.SEND, 4, 100),
        (Collective.RECV, 4, 0),
    ],
)
def test_what_leaves_a_rank_is_less_than_what_the_call_is_given(op: Collective, size: int, sent: int) -> None:
    assert sent_bytes(op, 100, size) == sent


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_has_traffic_in_every_group_that_it_uses(loader: Loader, name: str) -> None:
    recipe = loader.recipe(recipes_root() / f"{name}.yaml")
    transfers = [t for rank in range(recipe.parallel.pipeline) for t in step_transfers(recipe, rank)]
    assert all(t.num_bytes > 0 and t.num_calls > 0 and t.group_size > 1 for t in transfers)
    used = {t.group for t in transfers}
    for group in (Group.TENSOR, Group.CONTEXT, Group.PIPELINE, Group.DATA_CONTEXT):
        assert (group in used) == (group_size(recipe.parallel, group) > 1), group


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_sent_along_the_pipeline_is_received(loader: Loader, name: str) -> None:
    recipe = loader.recipe(recipes_root() / f"{name}.yaml")
    carried = Counter[Collective]()
    for rank in range(recipe.parallel.pipeline):
        for transfer in step_transfers(recipe, rank):
            if transfer.group is Group.PIPELINE:
                carried[transfer.op] += transfer.num_bytes
    assert carried[Collective.SEND] == carried[Collective.RECV]
