"""A small legal recipe in a folder of its own, which tests break one line at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.harness.mcore_config import override_problems
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader

MODEL = """\
key: tiny
display_name: Tiny
hf_id: example/tiny
default_run: cpu_host_8g_bf16
num_layers: 8
hidden_size: 64
vocab_size: 512
max_position_embeddings: 4096
dense_ffn_hidden_size: 128
attention:
  kind: gqa
  num_heads: 8
  num_query_groups: 4
  head_dim: 16
rope:
  rope_theta: 10000.0
activation:
  kind: swiglu
moe:
  num_experts: 16
  top_k: 2
  expert_ffn_hidden_size: 32
  num_leading_dense_layers: 1
  router:
    score_function: softmax
    renormalise: true
norm_epsilon: 1.0e-6
published:
  total_params: 1.0e+6
  active_params: 0.5e+6
  source: made up for a test
sources: ["made up for a test"]
"""

SYSTEM = """\
key: cpu_host
display_name: this machine
gpu: null
gpus_per_node: 8
nvlink_domain_gpus: 1
nic_bytes_per_s: null
sources: []
"""

RECIPE = """\
model: tiny
system: cpu_host
precision: bf16
seq_len: 4096
global_batch_size: 64
micro_batch_size: 1
parallel:
  num_gpus: 8
  pipeline: 2
  expert: 4
kernels:
  family: torch_native
dispatch:
  dispatcher: alltoall
routing:
  mode: random_logits
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "systems").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "systems" / "cpu_host.yaml").write_text(SYSTEM)
    (tmp_path / "tiny" / "model.yaml").write_text(MODEL)
    (tmp_path / "tiny" / "cpu_host_8g_bf16.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def loader(root: Path) -> Loader:
    return Loader(root=root, rules=(legality_problems, override_problems))


@pytest.fixture
def recipe_path(root: Path) -> Path:
    return root / "tiny" / "cpu_host_8g_bf16.yaml"


@pytest.fixture
def complaints(
    loader: Loader, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """The lines that the loader prints about a recipe with this text."""
    monkeypatch.chdir(recipe_path.parent)

    def complain(text: str) -> list[str]:
        recipe_path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            loader.recipe(recipe_path)
        return str(caught.value).splitlines()

    return complain
