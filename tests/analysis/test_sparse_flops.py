"""Operations of attention to chosen keys by hand."""

from moe_bench.analysis.params import indexer_params
from moe_bench.analysis.projection_flops import indexer_projection_flops
from moe_bench.analysis.sparse_flops import indexer_score_flops, sparse_core_flops
from moe_bench.spec.mixer import SparseIndexer

GLM = SparseIndexer(num_heads=32, head_dim=128, num_chosen_keys=2048, num_leading_layers=3, every_n_layers=4)


def pairs(seq_len: int, chosen: int) -> int:
    return sum(min(query + 1, chosen) for query in range(seq_len))


def test_a_query_sees_the_keys_before_it_up_to_the_chosen_number() -> None:
    for seq_len in (1024, 2048, 4096):
        flops = sparse_core_flops(
            num_seqs=3, seq_len=seq_len, num_heads=64, kv_rank=512, rope_dim=64, num_chosen_keys=2048
        )
        # scores over 576 channels, values over 512
        assert flops == 2 * 3 * 64 * (576 + 512) * pairs(seq_len, 2048)


def test_every_key_before_a_query_is_scored() -> None:
    assert indexer_score_flops(num_seqs=2, seq_len=4096, indexer=GLM) == (
        2 * 2 * 32 * (128 + 1) * pairs(4096, 4096)
    )


def test_the_indexer_projects_queries_one_key_and_a_weight_per_head() -> None:
    weights = 2048 * 32 * 128 + 6144 * 128 + 6144 * 32
    assert indexer_projection_flops(tokens=7, hidden=6144, q_rank=2048, indexer=GLM) == 2 * 7 * weights
    assert indexer_params(GLM, hidden=6144, q_rank=2048).replicated == weights + 2 * 128
