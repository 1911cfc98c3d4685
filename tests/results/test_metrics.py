"""Numbers of a table against hand counts."""

import pytest

from moe_bench.analysis.flops import forward_flops_by_part, step_flops
from moe_bench.results.metrics import COUNTING, gpu_s_per_token, max_over_mean_load_ratio, run_metrics
from tests.results.records import RECIPE, full, one_rank, record, smoke


def test_throughput_is_tokens_over_the_median_of_the_slowest_rank() -> None:
    metrics = run_metrics(record(step_times_s=((0.1, 0.5, 0.2), (0.3, 0.1, 0.1))))
    # slowest: 0.3, 0.5, 0.2
    assert metrics.step_time_s == pytest.approx(0.3)
    tokens = smoke().recipe.global_batch_size * smoke().recipe.seq_len
    assert metrics.tokens_per_s == pytest.approx(tokens / 0.3)
    assert metrics.tokens_per_s_per_gpu == pytest.approx(tokens / 0.3 / 2)


def test_mfu_divides_by_the_bf16_peak_of_the_recipes_gpu() -> None:
    metrics = run_metrics(record(full(), step_times_s=((10.0,),) * 8))
    expected_flops_per_s = step_flops(RECIPE, counting=COUNTING) / 8 / 10.0
    assert metrics.flops_per_s_per_gpu == pytest.approx(expected_flops_per_s)
    assert metrics.mfu_fraction == pytest.approx(expected_flops_per_s / 989.4e12)


def test_without_a_peak_there_is_no_mfu() -> None:
    assert run_metrics(record()).mfu_fraction is None


def test_the_load_ratio_is_that_of_the_worst_layer() -> None:
    # layer 0: 10 and 30 tokens, mean 20; layer 1 is balanced
    assert max_over_mean_load_ratio(record()) == pytest.approx(1.5)


def test_memory_and_slowness_name_their_rank() -> None:
    metrics = run_metrics(record(step_times_s=((0.1,), (0.3,))))
    assert (metrics.peak_memory_bytes, metrics.peak_memory_rank) == (2**30 + 1, 1)
    assert (metrics.slowest_rank, metrics.slowest_host) == (1, "node1")


def test_energy_is_that_of_all_gpus_per_token_of_the_timed_steps() -> None:
    counted = record(full(), step_times_s=((10.0, 10.0),) * 8)
    samples = counted.samples.model_copy(update={"energy_j": (7000.0,) * 8})
    metrics = run_metrics(counted.model_copy(update={"samples": samples}))
    assert metrics.energy_per_token_j == pytest.approx(56000.0 / (2 * RECIPE.tokens_per_step))
    assert run_metrics(counted).energy_per_token_j is None


def test_the_numbers_of_a_slice_are_those_of_the_layers_and_tokens_of_its_rank() -> None:
    found = record(one_rank(), step_times_s=((10.0,),))
    cut = found.plan.recipe
    assert (cut.parallel.num_gpus, cut.parallel.tensor, cut.parallel.context) == (8, 1, 1)
    num_seqs = cut.num_micro_batches * cut.micro_batch_size
    metrics = run_metrics(found)
    assert metrics.tokens_per_s == pytest.approx(num_seqs * cut.seq_len / 10.0)
    assert metrics.tokens_per_s_per_gpu == metrics.tokens_per_s
    assert gpu_s_per_token(found) == pytest.approx((1 / metrics.tokens_per_s,))
    forward = forward_flops_by_part(
        cut.model,
        num_seqs=num_seqs,
        seq_len=cut.seq_len,
        num_mtp_layers=cut.num_mtp_layers,
        counting=COUNTING,
    )
    assert metrics.flops_per_s_per_gpu == pytest.approx(3 * sum(forward.values()) / 10.0)
