"""Packed weights are the simulated ones bit by bit, and 8-bit products are those of the same values."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import GroupedQuantizer, TensorQuantizer
from modelopt.torch.quantization.qtensor import FP8QTensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.quantize.formats import round_mxfp4, round_nvfp4, stored, unpacked
from moe_bench.harness.quantize.packed import Fp8Products, PackedWeight, UnpackedProducts
from moe_bench.harness.quantize.program import Quantized
from moe_bench.spec.mixer import MultiLatentAttention
from moe_bench.spec.quantization import QuantizeJob
from moe_bench.spec.recipe import QuantFormat
from tests.harness.quantize.emulated import emulated, work_emulated
from tests.harness.quantize.jobs import alone, job_of, part, quantized, with_recipe
from tests.harness.quantize.test_formats import E2M1
from tests.harness.zygote import Zygote

pytestmark = pytest.mark.filterwarnings("ignore")
COUNTS = [5, 0, 9, 2]
"""Odd numbers of tokens, and an expert without any."""


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fp8_quantizer(amax: float | Tensor) -> TensorQuantizer:
    """Of modelopt's preset, calibrated to `amax`."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=None))
    quantizer.amax = torch.as_tensor(amax)
    return quantizer


def fp8_stack() -> tuple[Tensor, PackedWeight, GroupedQuantizer]:
    """Four matrices of very different sizes with a scale each; one has nothing but zeros."""
    weight = draw(4, 48, 64) * torch.tensor([1.0, 0.0, 1e-3, 50.0])[:, None, None].bfloat16()
    quantizers = GroupedQuantizer(*(fp8_quantizer(matrix.abs().max()) for matrix in weight))
    return weight, PackedWeight.of(weight, "fp8", quantizers), quantizers


def offsets() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("cut", [1.0, 0.3])
def test_a_packed_fp8_matrix_is_what_modelopt_s_quantiser_makes_of_it(cut: float) -> None:
    weight = draw(96, 64)
    quantizer = fp8_quantizer(weight.abs().max() * cut)
    held = PackedWeight.of(weight, "fp8", quantizer)
    assert held.tensors["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(held.unpacked(), quantizer(weight))
    assert held.num_bytes == 96 * 64 + 4


def test_a_packed_stack_has_a_scale_for_each_expert() -> None:
    weight, held, quantizers = fp8_stack()
    simulated = torch.stack([one(matrix) for one, matrix in zip(quantizers, weight, strict=True)])
    assert torch.equal(held.unpacked(), simulated)
    assert held.num_bytes == 4 * (48 * 64 + 4)
    assert held.tensor_scale_bytes == 4 * 4


def test_modelopt_s_own_fp8_packing_rounds_twice() -> None:
    """Why `stored` does not use it: dividing in BF16 moves values onto ties of E4M3."""
    weight = draw(256, 256)
    amax = weight.abs().max().float()
    theirs, _ = FP8QTensor.quantize(weight, scales=amax / 448)
    ours = stored(weight, "fp8", amax)["weight"]
    off = (theirs._quantized_data.float() != ours.float()).float().mean()
    assert 0.01 < off < 0.1


@pytest.mark.parametrize(
    ("format", "num_bytes"), [("nvfp4", 48 * 64 // 2 + 48 * 4), ("mxfp4", 48 * 64 // 2 + 96)]
)
def test_four_bit_stacks_lie_two_values_in_a_byte(format: QuantFormat, num_bytes: int) -> None:
    weight = draw(3, 48, 64)
    each = [stored(matrix, format, matrix.abs().max()) for matrix in weight]
    held = PackedWeight(
        format=format,
        tensors={kind: torch.stack([one[kind] for one in each]) for kind in each[0]},
        dtype=torch.bfloat16,
    )
    rounded = [
        round_nvfp4(matrix, matrix.abs().max()) if format == "nvfp4" else round_mxfp4(matrix)
        for matrix in weight
    ]
    assert torch.equal(held.unpacked(), torch.stack(rounded))
    assert held.num_bytes == 3 * (num_bytes + (4 if format == "nvfp4" else 0))
    low = held.tensors["weight"] & 0x07
    values = torch.tensor(E2M1)[low.long()]
    powers = held.unpacked()[..., ::2].abs().float() / values
    assert (powers[values > 0] > 0).all()


def test_an_fp8_dense_product_is_the_simulated_one_but_for_rounding() -> None:
    x, weight = draw(2, 7, 64), draw(96, 64, seed=2)
    inputs, weights = fp8_quantizer(x.abs().max() * 0.7), fp8_quantizer(weight.abs().max())
    held = PackedWeight.of(weight, "fp8", weights)
    real = Fp8Products(held, inputs, name="layer").linear(x)
    simulated = UnpackedProducts(held, inputs).linear(x)
    exact = inputs(x.float()).double() @ weights(weight.float()).double().T
    assert real.shape == (2, 7, 96)
    # rounded once, to BF16; the CPU's kernel sums in FP32
    torch.testing.assert_close(real.double(), exact, rtol=2**-8, atol=1e-4)
    # the simulation has rounded both factors to BF16 before
    assert 0 < (real - simulated).norm() / simulated.norm() < 2**-7


def test_an_fp8_grouped_product_takes_each_expert_s_scale_and_any_group() -> None:
    weight, held, quantizers = fp8_stack()
    x = draw(sum(COUNTS), 64, seed=3)
    inputs = fp8_quantizer(x.abs().max() * 0.7)
    with emulated():
        real = Fp8Products(held, inputs, name="experts").grouped(x, offsets())
    rows = inputs(x.float()).double().split(COUNTS)
    matrices = [one(matrix.float()).double() for one, matrix in zip(quantizers, weight, strict=True)]
    exact = torch.cat([part @ matrix.T for part, matrix in zip(rows, matrices, strict=True)])
    torch.testing.assert_close(real.double(), exact, rtol=2**-8, atol=0)
    empty = Fp8Products(held, inputs, name="experts").grouped(x[:0], offsets() * 0)
    assert empty.shape == (0, 48)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [(draw(96, 56), "56 inputs and 96 outputs .* multiples of 16"), (draw(96, 64).float(), "float32")],
)
def test_what_no_fp8_kernel_takes_is_refused_by_name(weight: Tensor, problem: str) -> None:
    held = PackedWeight.of(weight, "fp8", fp8_quantizer(1.0))
    with pytest.raises(MissingRequirementError, match=rf"decoder\.fc1: .*{problem}"):
        Fp8Products(held, fp8_quantizer(1.0), name="decoder.fc1")


def with_tensor_ranks(job: QuantizeJob) -> QuantizeJob:
    """Two tensor ranks, whose sequence is cut, without pipeline or expert ranks."""
    parallel = alone(job).plan.recipe.parallel
    return with_recipe(
        job, parallel=parallel.model_copy(update={"num_gpus": 2, "tensor": 2, "sequence_parallel": True})
    )


@pytest.mark.parametrize(
    ("recipe", "format"),
    [("gpt_oss_20b", "nvfp4"), pytest.param("deepseek_v3", "mxfp4", marks=pytest.mark.slow)],
)
def test_a_model_of_packed_weights_is_its_simulation(
    zygote: Zygote, recipe: str, format: QuantFormat
) -> None:
    simulated = with_tensor_ranks(job_of(recipe, format=format))
    found = [
        quantized(zygote, simulated.model_copy(update={"arithmetic": how})) for how in ("simulated", "packed")
    ]
    assert found[1].report.kl_from_simulated == 0
    assert found[0].report.quantized_loss == found[1].report.quantized_loss
    assert found[0].report.parts == found[1].report.parts
    assert part(found[1], "mlp.experts.linear_fc1").left_out_because is None


def with_widths_of_16(job: QuantizeJob) -> QuantizeJob:
    """Where the toy's latent and position key together are 40 wide."""
    model = job.plan.recipe.model
    if not isinstance(model.attention, MultiLatentAttention):
        return job
    attention = model.attention.model_copy(update={"qk_rope_head_dim": 16})
    return with_recipe(job, model=model.model_copy(update={"attention": attention}))


@pytest.mark.parametrize("recipe", ["gpt_oss_20b", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_model_of_fp8_products_is_near_its_simulation(zygote: Zygote, recipe: str) -> None:
    job = with_widths_of_16(with_tensor_ranks(job_of(recipe, format="fp8")))
    job = job.model_copy(update={"arithmetic": "real"})
    found = zygote.fork(2, partial(work_emulated, job, None))[0]
    assert isinstance(found, Quantized)
    report = found.report
    assert report.kernels is not None
    assert report.kl_from_simulated is not None
    # products differ by roundings to BF16, after which a few tokens of the second layer go to other experts
    assert 0 < report.kl_from_simulated < report.kl_divergence / 2


@pytest.mark.gpu("FP8 products run on Hopper alone")
def test_fp8_products_on_the_device_are_those_of_the_same_values() -> None:
    weight, _, _ = fp8_stack()
    x = draw(sum(COUNTS), 64, seed=3).cuda()
    inputs = fp8_quantizer(x.abs().max() * 0.7)
    quantizers = GroupedQuantizer(*(fp8_quantizer(matrix.abs().max().cuda()) for matrix in weight))
    products = Fp8Products(PackedWeight.of(weight.cuda(), "fp8", quantizers), inputs, name="experts")
    with emulated():
        on_host = Fp8Products(fp8_stack()[1], fp8_quantizer(inputs.amax.cpu()), name="experts")
        expected = on_host.grouped(x.cpu(), offsets()).float()
    found = products.grouped(x, offsets().cuda()).cpu().float()
    # fast accumulation drops bits below the largest term of a sum
    assert ((found - expected).norm(dim=1) <= 0.01 * expected.norm(dim=1)).all()
    matrix = weight[0]
    dense = Fp8Products(PackedWeight.of(matrix.cuda(), "fp8", quantizers[0]), inputs, name="dense").linear(x)
    on_host = Fp8Products(
        PackedWeight.of(matrix, "fp8", fp8_quantizer(matrix.abs().max())),
        fp8_quantizer(inputs.amax.cpu()),
        name="dense",
    )
    expected = on_host.linear(x.cpu()).float()
    assert ((dense.cpu().float() - expected).norm(dim=1) <= 0.01 * expected.norm(dim=1)).all()


@pytest.mark.gpu("modelopt's own kernels for the formats need CUDA")
@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4"])
def test_packed_weights_are_what_modelopt_s_kernels_round_to(format: QuantFormat) -> None:
    import modelopt.torch.quantization as mtq

    presets = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG, "mxfp4": mtq.MXFP4_DEFAULT_CFG}
    (config,) = (
        rule["cfg"] for rule in presets[format]["quant_cfg"] if rule["quantizer_name"] == "*weight_quantizer"
    )
    weight = draw(256, 256).cuda()
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**config))
    if format != "mxfp4":
        quantizer.amax = weight.abs().max()
    held = unpacked(stored(weight, format, quantizer.amax), format, weight.dtype)
    # kernels that multiply by inverses may put a value that lies on a tie on its other side
    assert (held != quantizer(weight)).float().mean() < 1e-3


@pytest.mark.gpu("FP8 products run on Hopper alone")
def test_a_model_of_fp8_products_is_near_its_simulation_on_the_device() -> None:
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "moe_bench"),
        *("quantize", "olmoe_1b_7b", "--scale", "node", "--num-gpus", "1", "--json"),
        *("--set", "global_batch_size=8", "--set", "micro_batch_size=1", "--set", "seq_len=512"),
        *("--calibration-batches", "1", "--evaluation-batches", "1"),
        *("--format", "fp8", "--arithmetic", "real"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["arithmetic"] == "real"
    assert 0 < report["kl_from_simulated"] < report["kl_divergence"]
