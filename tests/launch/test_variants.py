import pytest

from moe_bench.errors import BadInputError
from moe_bench.launch.variants import Variant, interleaved


def test_an_experiment_is_the_product_of_its_values_interleaved() -> None:
    jobs = interleaved(["dispatcher=alltoall,deepep", "micro_batch_size=1,2"], num_repeats=2)
    once = [
        ("dispatch.dispatcher=alltoall", "micro_batch_size=1"),
        ("dispatch.dispatcher=alltoall", "micro_batch_size=2"),
        ("dispatch.dispatcher=deepep", "micro_batch_size=1"),
        ("dispatch.dispatcher=deepep", "micro_batch_size=2"),
    ]
    assert [job.changes for job in jobs] == once + once
    assert [job.repeat for job in jobs] == [0] * 4 + [1] * 4


def test_without_anything_to_vary_there_is_one_job_per_repeat() -> None:
    assert interleaved((), num_repeats=1) == (Variant(changes=(), repeat=0),)
    assert len(interleaved((), num_repeats=3)) == 3


def test_a_list_is_one_value() -> None:
    jobs = interleaved(["recompute.modules=[moe_act,layernorm],[]"], num_repeats=1)
    assert [job.changes for job in jobs] == [
        ("recompute.modules=[moe_act,layernorm]",),
        ("recompute.modules=[]",),
    ]


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        (["dispatcher"], "expected FIELD=VALUE"),
        (["dispatcher="], "expected FIELD=VALUE"),
        (["dispatcher=a,,b"], "expected FIELD=VALUE"),
        (["dispatcher=a,a"], "a value is given twice"),
        (["dispatcher=a", "dispatch.dispatcher=b"], "a field may vary once"),
        (["dispacher=a"], "did you mean 'dispatcher'"),
    ],
)
def test_what_cannot_be_varied_is_refused(vary: list[str], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        interleaved(vary, num_repeats=1)


def test_the_sizes_of_a_family_are_one_more_axis_of_the_product() -> None:
    jobs = interleaved(["micro_batch_size=1,2"], num_repeats=2, sizes=(8, 16))
    once = [(8, "1"), (8, "2"), (16, "1"), (16, "2")]
    assert [(job.num_gpus, job.changes[0].partition("=")[2]) for job in jobs] == once + once
    assert [job.repeat for job in jobs] == [0] * 4 + [1] * 4


def test_a_size_given_twice_is_refused() -> None:
    with pytest.raises(BadInputError, match="--num-gpus 64,64: a size is given twice"):
        interleaved((), num_repeats=1, sizes=(64, 64))
