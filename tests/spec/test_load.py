"""A mistake in a recipe is one line with file, line, key, problem and fix."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError, RecipeError
from moe_bench.spec.check import check_recipes
from moe_bench.spec.load import Loader, UnknownNameError
from tests.spec.conftest import MODEL, RECIPE

Complaints = Callable[[str], list[str]]
FILE = "cpu_host_8g_bf16.yaml"


def test_a_legal_recipe_is_read_whole(loader: Loader, recipe_path: Path) -> None:
    recipe = loader.recipe(recipe_path)
    assert recipe.name == "tiny/cpu_host_8g_bf16"
    assert recipe.model.num_layers == 8
    assert recipe.parallel.data == 4
    assert recipe.num_micro_batches == 16


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "micro_batch_size: 1",
            "micro_bacth_size: 1",
            f"{FILE}:6: micro_bacth_size: unknown key; did you mean 'micro_batch_size'?",
        ),
        (
            "  expert: 4",
            "  expert: 4\n  expert: 2",
            f"{FILE}:11: parallel.expert: written twice (first in line 10); delete one of the two lines",
        ),
        (
            "seq_len: 4096",
            "seq_len: 4e3",
            f"{FILE}:4: seq_len: YAML reads 4e3 as str; write 4000",
        ),
        (
            "seq_len: 4096",
            "seq_len: many",
            f"{FILE}:4: seq_len: is many; it must be a valid integer",
        ),
        ("seq_len: 4096\n", "", f"{FILE}:1: seq_len: missing; add `seq_len: ...`"),
        (
            "precision: bf16",
            "precision: bf17",
            f"{FILE}:3: precision: bf17 is not known; write one of fp32, bf16, fp8_delayed, fp8_tensorwise, "
            "fp8_blockwise, fp8_rowwise, mxfp8 or nvfp4",
        ),
        (
            "model: tiny",
            "model: tyni",
            f"{FILE}:1: model: there is no model 'tyni'; did you mean 'tiny'?",
        ),
        (
            "precision: bf16",
            "precision: bf16\ncontainer: 26.10",
            f'{FILE}:4: container: YAML reads 26.10 as float, text is expected; quote it: "26.10"',
        ),
        (
            "precision: bf16",
            "precision: bf16\noptimizer: {learning_rate: 1e-4}",
            f"{FILE}:4: optimizer.learning_rate: YAML reads 1e-4 as str; write 1.0e-04",
        ),
        (
            "precision: bf16",
            "precision: bf16\noptimizer: {learning_rate: 12.3456e0}",
            f"{FILE}:4: optimizer.learning_rate: YAML reads 12.3456e0 as str; write 1.23456e+01",
        ),
        (
            "precision: bf16",
            "precision: bf16\nvariant: fast",
            f"{FILE}:1: -: the file is called {FILE}, its content is cpu_host_8g_bf16_fast; "
            "rename it to cpu_host_8g_bf16_fast.yaml, or change the content or `variant`",
        ),
        (
            "precision: bf16",
            "precision: bf16\nmcore: {moe_zloss_coeff: 0.1}",
            f"{FILE}:4: mcore.moe_zloss_coeff: Megatron-Core 0.19 has no such field; "
            "did you mean moe_z_loss_coeff or ",
        ),
        (
            "precision: bf16",
            "precision: bf16\nmcore: {moe_router_topk: 4}",
            f"{FILE}:4: mcore.moe_router_topk: the recipe schema already covers this; "
            "set the recipe's own key",
        ),
        (
            "  expert: 4",
            "  expert: 3",
            f"{FILE}:10: parallel.expert: ETP1 x EP3 x PP2 = 6 GPUs, num_gpus = 8: expert tensor, expert "
            "and pipeline ranks must tile the job (megatron/core/parallel_state.py:882); "
            "use 6 or 12 GPUs, or EP2",
        ),
        ("model: tiny", "model: [", f"{FILE}:3: -: not YAML"),
        (
            "  expert: 4",
            "\texpert: 4",
            f"{FILE}:10: -: not YAML (found a tab character that violates indentation); indent with spaces",
        ),
        (
            "  expert: 4",
            "  expert: &expert [*expert]",
            f"{FILE}:1: -: is nested too deep, or holds itself by an alias; write the value out",
        ),
        (
            "precision: bf16",
            "precision: bf16\nvariant: Two Words",
            f"{FILE}:4: variant: is Two Words; it should match pattern '^[a-z0-9_]*$'",
        ),
        (
            "precision: bf16",
            "precision: bf16\npatches: [mtp_fix]",
            f"{FILE}:4: patches.0: mtp_fix is not known; write one of mtp_token_count_under_cp",
        ),
        (
            "model: tiny",
            "model: tiny: 2",
            f"{FILE}:1: -: not YAML (mapping values are not allowed in this context); "
            "quote text with a colon in it",
        ),
        (
            "precision: bf16",
            "precision: bf16\nmcore: {zzz: 4}",
            f"{FILE}:4: mcore.zzz: Megatron-Core 0.19 has no such field; write a field of Distributed",
        ),
        (
            "precision: bf16",
            "precision: bf16\nsteps: 4",
            f"{FILE}:4: steps: is 4; it must be a mapping, `key: value` lines below it",
        ),
        (
            "precision: bf16",
            "precision: bf16\nrecompute: {granularity: selective, modules: moe_act}",
            f"{FILE}:4: recompute.modules: is moe_act; it must be a list, `- value` lines below it",
        ),
    ],
)
def test_a_mistake_names_file_line_key_problem_and_fix(
    complaints: Complaints, old: str, new: str, line: str
) -> None:
    assert old in RECIPE
    assert any(complaint.startswith(line) for complaint in complaints(RECIPE.replace(old, new)))


def test_mistakes_come_in_file_order_and_at_most_ten(complaints: Complaints) -> None:
    lines = complaints(RECIPE + "".join(f"wrong_{index}: 1\n" for index in range(12)))
    assert len(lines) == 11
    assert [int(line.split(":")[1]) for line in lines[:10]] == list(range(17, 27))
    assert lines[-1] == "and 2 more"


def test_a_mistake_in_the_model_names_the_models_own_file(
    loader: Loader, recipe_path: Path, root: Path
) -> None:
    (root / "tiny" / "model.yaml").write_text(MODEL.replace("top_k: 2", "top_k: two"))
    with pytest.raises(
        RecipeError, match=r"model\.yaml:21: model\.moe\.top_k: is two; it must be a valid integer"
    ):
        loader.recipe(recipe_path)


def test_a_change_derives_another_recipe(loader: Loader, recipe_path: Path) -> None:
    recipe = loader.recipe(recipe_path, changes=("parallel.expert=2", "model.num_layers=4"))
    assert (recipe.parallel.expert, recipe.model.num_layers) == (2, 4)


def test_of_two_changes_the_later_one_counts(loader: Loader, recipe_path: Path) -> None:
    block, leaf = "token_drop=null", "token_drop.capacity_factor=1.5"
    assert loader.recipe(recipe_path, changes=(leaf, block)).token_drop is None
    kept = loader.recipe(recipe_path, changes=(block, leaf)).token_drop
    assert kept is not None
    assert kept.capacity_factor == 1.5


def test_a_wrong_change_is_named_as_typed(loader: Loader, recipe_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^--set parallel.expart=2: parallel.expart: unknown key; did you mean"
    ):
        loader.recipe(recipe_path, changes=("parallel.expart=2",))
    with pytest.raises(BadInputError, match="expected key=value"):
        loader.recipe(recipe_path, changes=("parallel.expert",))


def test_what_is_in_no_file_is_told_once(loader: Loader, recipe_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"^--set parallel\.expert: expected key=value"):
        check_recipes((recipe_path,), derive=lambda path: loader.recipe(path, changes=("parallel.expert",)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("h100", "did you mean 'h100_sxm' or 'h100_96gb' or 'h800'?"),
        ("zzz", "known here: b200, h100_96gb, h100_sxm, h200, h800"),
    ],
)
def test_names_that_begin_so_come_first_and_where_none_is_near_all_are_told(name: str, advice: str) -> None:
    error = UnknownNameError("system", name, ["b200", "h100_96gb", "h100_sxm", "h200", "h800"])
    assert str(error) == f"there is no system {name!r}; {advice}"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "key: tiny",
            "key: tinny",
            "key: is tinny, and the file is that of tiny; write `key: tiny`, or rename",
        ),
        ("kind: gqa", "kind: mha", "model.attention.kind: mha is not known; write one of gqa, mla"),
    ],
)
def test_a_mistake_in_a_models_file_stands_there(
    root: Path, recipe_path: Path, old: str, new: str, told: str
) -> None:
    path = root / "tiny" / "model.yaml"
    lines = path.read_text().replace(old, new, 1).splitlines()
    path.write_text("\n".join(lines))
    number = next(index for index, line in enumerate(lines, start=1) if new in line)
    with pytest.raises(RecipeError) as raised:
        Loader(root=root).recipe(recipe_path)
    assert str(raised.value).startswith(f"{path}:{number}: {told}")


def test_a_recipe_in_the_wrong_models_folder_is_refused(loader: Loader, root: Path) -> None:
    (root / "other").mkdir()
    misplaced = root / "other" / FILE
    misplaced.write_text(RECIPE)
    with pytest.raises(RecipeError, match="model tiny stands in the folder other; move it to tiny/"):
        loader.recipe(misplaced)


def test_an_unknown_system_offers_the_known_ones(loader: Loader) -> None:
    with pytest.raises(UnknownNameError, match="there is no system 'cpu_hots'; did you mean 'cpu_host'"):
        loader.system("cpu_hots")
