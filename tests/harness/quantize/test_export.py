"""What is written for Hugging Face, read back by the formats' definitions, is what was simulated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file

from moe_bench.checkpoints.family import family_of
from moe_bench.checkpoints.rule import Rule
from moe_bench.checkpoints.safetensors_folder import logical_tensors, require_match
from moe_bench.errors import BadInputError
from moe_bench.harness.all_ranks import Place
from moe_bench.harness.convert.rearrange import to_huggingface, to_megatron
from moe_bench.harness.convert.stored import tensor_reader
from moe_bench.harness.quantize.export import export, require_layout
from moe_bench.harness.quantize.model import is_quantized
from moe_bench.harness.quantize.program import Quantized, quantized_model
from moe_bench.harness.weights import sharded_tensors
from moe_bench.harness.workers import Seat
from moe_bench.spec.quantization import QuantizeJob
from moe_bench.spec.recipe import QuantFormat
from tests.harness.quantize.jobs import alone, job_of, quantized
from tests.harness.quantize.test_formats import E2M1
from tests.harness.quantize.vllm_layout import ALGORITHMS, require_readable
from tests.harness.zygote import Zygote

SIMULATED = "simulated.pt"
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A toy's random weights, what they are as its model multiplies them, and the folder made of them."""

    rules: tuple[Rule, ...]
    simulated: dict[str, Tensor]
    """Whole rounded weights by key."""
    found: Quantized
    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            name: one for file in self.folder.glob("*.safetensors") for name, one in load_file(file).items()
        }

    def config(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def written(zygote: Zygote, job: QuantizeJob, folder: Path) -> Written:
    model = job.plan.recipe.model
    rules = tuple(family_of(model).rules(model, num_mtp_layers=0))
    require_layout(job, rules)
    found = quantized(zygote, job)
    zygote.fork(1, partial(save, job, folder))
    target = folder / "export"
    export(
        job,
        found,
        folder / "weights",
        target,
        rules=rules,
        max_shard_bytes=100_000,
        on_tensor=lambda rule: None,
    )
    simulated = torch.load(folder / SIMULATED)
    return Written(rules=rules, simulated=simulated, found=found, folder=target)


def save(job: QuantizeJob, folder: Path, seat: Seat) -> None:
    """Save the weights of `job`'s model, and beside them what its quantisers make of them."""
    place = Place(rendezvous=seat.rendezvous, listen_fd=seat.listen_fd, tell=seat.send)
    with quantized_model(job, None, place) as (training, _):
        (model,) = unwrap_model(list(training.chunks))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        (folder / "weights").mkdir()
        state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group}), "num_steps": 0}
        dist_checkpointing.save(state, str(folder / "weights"))
        keys = {shard.data.untyped_storage().data_ptr(): shard.key for shard in sharded_tensors(model)}
        simulated = {
            keys[weight.untyped_storage().data_ptr()]: rounded(module, weight).detach()
            for module in model.modules()
            if is_quantized(module)
            for weight in (module.get_parameter("weight"),)
        }
        torch.save(simulated, folder / SIMULATED)


def rounded(module: Any, weight: Tensor) -> Tensor:
    whole: Tensor = module.weights[0] if weight.dim() == 3 else module.weight_quantizer(weight)
    return whole


def unpacked(packed: Tensor) -> Tensor:
    """E2M1 values, two in a byte and the first in its low half."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return table[torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2).long()]


def meant(format: QuantFormat, tensors: dict[str, Tensor], module: str) -> Tensor:
    """BF16 [out, in] that the stored tensors of a module stand for."""
    values, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if format == "fp8":
        return (values.float() * scale).to(torch.bfloat16)
    if format == "nvfp4":
        blocks = scale.float() * tensors[f"{module}.weight_scale_2"]
        return (unpacked(values) * blocks.repeat_interleave(16, -1)).to(torch.bfloat16)
    powers = torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
    return (unpacked(values) * powers).to(torch.bfloat16)


def parts(rule: Rule, simulated: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    whole = simulated[rule.megatron]
    whole = whole if rule.expert is None else whole[rule.expert]
    for named, part in zip(rule.huggingface, to_huggingface(rule, whole), strict=True):
        yield named.name.removesuffix(".weight"), part


CASES = [
    pytest.param("qwen3_30b_a3b", "nvfp4"),
    pytest.param("qwen3_30b_a3b", "fp8", marks=pytest.mark.slow),
    pytest.param("qwen3_30b_a3b", "mxfp4", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "fp8", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "nvfp4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "format"), CASES)
def test_every_weight_that_is_read_back_is_the_one_that_was_simulated(
    zygote: Zygote, tmp_path: Path, recipe: str, format: QuantFormat
) -> None:
    made = written(zygote, alone(job_of(recipe, format=format)), tmp_path)
    tensors = made.tensors
    assert made.simulated.keys() == made.found.keys
    for rule in made.rules:
        if rule.megatron in made.simulated:
            for module, part in parts(rule, made.simulated):
                assert torch.equal(meant(format, tensors, module), part), module
                assert (f"{module}.input_scale" in tensors) == (format != "mxfp4")
        else:
            for named in rule.huggingface:
                assert tensors[named.name].shape == named.shape
    algorithm = {"fp8": "FP8", "nvfp4": "NVFP4", "mxfp4": "mxfp4"}[format]
    described = made.config("hf_quant_config.json")
    assert described["quantization"]["quant_algo"] == algorithm
    assert "lm_head" in described["quantization"]["exclude_modules"]
    config = made.config("config.json")
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["model_type"] == {"qwen3_30b_a3b": "qwen3_moe"}.get(recipe, recipe)
    if format == "mxfp4":
        assert algorithm.upper() not in ALGORITHMS  # as docs/quantize.md says
    else:
        require_readable(tensors, config["quantization_config"], algorithm=algorithm)


@pytest.fixture(scope="module")
def gpt_oss(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Written:
    job = alone(job_of("gpt_oss_20b", format="mxfp4", experts_only=True))
    return written(zygote, job, tmp_path_factory.mktemp("gpt_oss"))


def test_experts_of_gpt_oss_are_written_as_published_and_read_by_convert(gpt_oss: Written) -> None:
    made = gpt_oss
    assert made.config("config.json")["quantization_config"]["quant_method"] == "mxfp4"
    logical = logical_tensors(made.folder)
    require_match(logical, made.rules, folder=made.folder)
    with tensor_reader(logical) as reader:
        for rule in made.rules:
            if rule.megatron in made.simulated:
                read = to_megatron(rule, [reader.read(named.name) for named in rule.huggingface])
                assert torch.equal(read, made.simulated[rule.megatron])


def test_transformers_loads_experts_of_gpt_oss_and_finds_the_simulated_weights(gpt_oss: Written) -> None:
    transformers = pytest.importorskip("transformers")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        gpt_oss.folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.Mxfp4Config(dequantize=True),  # its 4-bit products need a GPU
        output_loading_info=True,
    )
    assert not any(loading.values())
    loaded = model.state_dict()
    for rule in gpt_oss.rules:
        if rule.megatron in gpt_oss.simulated:
            for named, part in zip(
                rule.huggingface, to_huggingface(rule, gpt_oss.simulated[rule.megatron]), strict=True
            ):
                assert torch.equal(loaded[named.name], part)


@pytest.mark.parametrize("asked", [{"format": "nvfp4", "experts_only": True}, {"format": "mxfp4"}])
def test_stacked_experts_have_one_published_layout(asked: dict[str, Any]) -> None:
    job = job_of("gpt_oss_20b", **asked)
    rules = tuple(family_of(job.plan.recipe.model).rules(job.plan.recipe.model, num_mtp_layers=0))
    with pytest.raises(BadInputError, match="export with --format mxfp4 --experts-only"):
        require_layout(job, rules)
