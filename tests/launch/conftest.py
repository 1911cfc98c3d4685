"""A job of 16 H100s and its toy of 8 processes, as the launch layer sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from moe_bench.launch.job import Job, job_size
from moe_bench.launch.site import Site
from moe_bench.launch.slurm import Installation
from moe_bench.spec.recipe import Recipe

RECIPE = """\
model:
  key: tiny
  display_name: Tiny
  hf_id: example/tiny
  default_run: h100_sxm_16g_bf16
  num_layers: 8
  hidden_size: 64
  vocab_size: 512
  max_position_embeddings: 4096
  dense_ffn_hidden_size: 128
  attention: {kind: gqa, num_heads: 8, num_query_groups: 4, head_dim: 16}
  rope: {rope_theta: 10000.0}
  activation: {kind: swiglu}
  moe:
    num_experts: 16
    top_k: 2
    expert_ffn_hidden_size: 32
    router: {score_function: softmax, renormalise: true}
  norm_epsilon: 1.0e-6
  published: {total_params: 1.0e+6, active_params: 0.5e+6, source: made up for a test}
  sources: [made up for a test]
system: null
precision: bf16
seq_len: 4096
global_batch_size: 64
micro_batch_size: 1
num_mtp_layers: 0
parallel: {num_gpus: 16, pipeline: 2, expert: 8}
kernels: {family: transformer_engine}
dispatch: {dispatcher: deepep}
routing: {mode: random_logits}
"""

SYSTEMS = Path(__file__).parents[2] / "recipes" / "systems"


def recipe_of(system: str = "h100_sxm", **changes: object) -> Recipe:
    """The recipe above on `system`; `changes` replace whole keys."""
    tree = yaml.safe_load(RECIPE)
    tree["system"] = yaml.safe_load((SYSTEMS / f"{system}.yaml").read_text(encoding="utf-8"))
    return Recipe.model_validate_json(json.dumps(tree | changes))


def job_of(recipe: Recipe | None = None, *, num_nodes: int | None = None, **site: object) -> Job:
    """A job of `recipe` on a site with the fields `site`."""
    recipe = recipe or recipe_of()
    return Job(
        recipe=recipe,
        run_args=("tiny",),
        site_name="here",
        site=Site.model_validate_json(json.dumps(site)),
        size=job_size(recipe, num_nodes=num_nodes),
        num_nodes_asked=num_nodes,
    )


class FakeRunner:
    """Answers commands by words that they hold, and keeps what it was asked."""

    def __init__(
        self,
        answers: dict[str, str],
        *,
        code: int = 0,
        codes: dict[str, int] | None = None,
        stderr: str = "",
    ) -> None:
        self.answers, self.code, self.codes, self.stderr = answers, code, codes or {}, stderr
        self.commands: list[str] = []

    def __call__(self, command: Sequence[str]) -> CompletedProcess[str]:
        line = " ".join(command)
        self.commands.append(line)
        answer = next((text for words, text in self.answers.items() if words in line), "")
        code = next((code for words, code in self.codes.items() if words in line), self.code)
        return CompletedProcess(list(command), code, answer, self.stderr)


@pytest.fixture
def installation() -> Installation:
    """A checkout under /repo, called from a home directory."""
    return Installation(
        script=Path("/repo/slurm/run_recipe.sh"),
        python="/repo/.venv/bin/python",
        workdir=Path("/home/me"),
        source=Path("/repo"),
    )
