"""A float without a unit in its name is a number nobody can check."""

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

import moe_bench

UNITS = (
    "_s", "_bytes", "_flops", "_flops_per_s", "_bytes_per_s", "_tokens_per_s", "_per_gpu", "_hz", "_w",
    "_j", "_fraction", "_factor", "_coefficient", "_rate", "_epsilon", "_std", "_theta", "_norm", "_norms",
    "_params", "_limit", "_offset", "_ratio", "_loss", "_losses", "_pct", "_ms", "_us", "_tflops", "_gb",
    "_hours", "_px", "_s_per_token",
)  # fmt: skip
DIMENSIONLESS = {
    "weight_decay", "adam_beta1", "adam_beta2", "beta_fast", "beta_slow", "factor", "losses", "loss",
    "value", "seconds", "target", "measured", "kl_divergence", "kl_from_simulated", "host_exponent",
    "exponent",
    "expert_bias_range", "temperature", "base_values", "variant_values", "repeat_values", "tolerance_values",
}  # fmt: skip
"""Names of numbers that have no unit or are one, or a value whose name, with its unit, stands beside it."""

PRINTED = "moe_bench.results.published"
"""The registry keeps what was printed, in the units that its keys name (TFLOPs, ms, percent)."""


def light_modules() -> Iterator[str]:
    for info in pkgutil.walk_packages(moe_bench.__path__, "moe_bench."):
        if not info.name.startswith(("moe_bench.harness", PRINTED, "moe_bench.__main__")):
            yield info.name


def is_number(annotation: object) -> bool:
    """Whether a field is a float, possibly absent, or a sequence of floats; values of any kind are not."""
    if annotation is float:
        return True
    inner = [kind for kind in typing.get_args(annotation) if kind not in (types.NoneType, Ellipsis, int)]
    origin = typing.get_origin(annotation)
    return (
        origin in (tuple, list, types.UnionType, typing.Union) and bool(inner) and all(map(is_number, inner))
    )


def type_parameters(kind: type) -> dict[str, object]:
    """The type parameters in scope of a class by name; Python 3.12 does not resolve them by itself."""
    return {one.__name__: one for base in kind.__mro__ for one in getattr(base, "__type_params__", ())}


def float_fields() -> Iterator[str]:
    for name in light_modules():
        module = importlib.import_module(name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ != name:
                continue
            if issubclass(kind, BaseModel):
                fields = {key: field.annotation for key, field in kind.model_fields.items()}
            elif dataclasses.is_dataclass(kind):
                fields = typing.get_type_hints(kind, localns=type_parameters(kind))
            else:
                continue
            for key, annotation in fields.items():
                if is_number(annotation):
                    yield f"{name}.{kind.__name__}.{key}"


@pytest.mark.parametrize("field", sorted(set(float_fields())))
def test_a_float_field_names_its_unit(field: str) -> None:
    key = field.rpartition(".")[2]
    is_count = key.startswith("num_")  # an expected number need not be whole
    assert key.endswith(UNITS) or key in DIMENSIONLESS or is_count, f"{field}: use one of {UNITS}"
