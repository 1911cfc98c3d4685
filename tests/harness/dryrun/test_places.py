"""Modules and phases are right on the way forward, backward and through recomputation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from moe_bench.harness.dryrun.places import OUTSIDE, Phase, Places, layer_of


class Noting(torch.autograd.Function):
    """Notes where it is run, forward and backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, places: Places, notes: list[tuple[str, str]]) -> Tensor:
        ctx.places, ctx.notes = places, notes  # type: ignore[attr-defined]
        notes.append(at(places))
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.notes.append(at(ctx.places))  # type: ignore[attr-defined]
        return grad, None, None


def at(places: Places) -> tuple[str, str]:
    spot = places.spot()
    return spot.phase.value, places.module(spot)


class Part(nn.Module):
    def __init__(self, places: Places, notes: list[tuple[str, str]]) -> None:
        super().__init__()
        self.places, self.notes = places, notes

    def forward(self, x: Tensor) -> Tensor:
        return Noting.apply(x, self.places, self.notes)


class Again(torch.autograd.Function):
    """Runs a module without autograd, and again in the backward pass."""

    @staticmethod
    def forward(ctx: object, module: nn.Module, places: Places, x: Tensor) -> Tensor:
        ctx.module, ctx.places, ctx.x = module, places, x.detach()  # type: ignore[attr-defined]
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, None, Tensor | None]:
        x = ctx.x.requires_grad_()  # type: ignore[attr-defined]
        with ctx.places.recomputing():  # type: ignore[attr-defined]
            with torch.enable_grad():
                output = ctx.module(x)  # type: ignore[attr-defined]
            torch.autograd.backward(output, grad)
        return None, None, x.grad


@pytest.fixture
def notes() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def places() -> Iterator[Places]:
    places = Places()
    places.phase = Phase.FORWARD
    with places.watched():
        yield places


def test_backward_runs_in_the_module_that_made_the_node(places: Places, notes: list[tuple[str, str]]) -> None:
    model = nn.Sequential(Part(places, notes), nn.Identity(), Part(places, notes))
    places.name_modules([model])
    model(torch.ones(2, requires_grad=True)).sum().backward()
    assert notes == [("forward", "0"), ("forward", "2"), ("backward", "2"), ("backward", "0")]
    assert at(places) == ("forward", OUTSIDE)


def test_recomputation_is_told_from_the_backward_pass_inside_it(
    places: Places, notes: list[tuple[str, str]]
) -> None:
    part = Part(places, notes)
    places.name_modules([nn.Sequential(part)])
    Again.apply(part, places, torch.ones(2, requires_grad=True)).sum().backward()
    assert notes == [("forward", "0"), ("recompute", "0"), ("backward", "0")]


def test_parts_that_are_no_modules_can_be_named(places: Places, notes: list[tuple[str, str]]) -> None:
    with places.inside("decoder.3"):
        output = Noting.apply(torch.ones(2, requires_grad=True), places, notes)
    output.sum().backward()
    assert notes == [("forward", "decoder.3"), ("backward", "decoder.3")]


def test_a_phase_lasts_as_long_as_its_block(places: Places) -> None:
    with places.during(Phase.PIPELINE):
        assert places.where() == ("pipeline", OUTSIDE)
    assert places.where() == ("forward", OUTSIDE)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("decoder.17.mlp.experts", "decoder.17"),
        ("mtp.0.transformer_layer", "mtp.0"),
        ("decoder.final_layernorm", "decoder.final_layernorm"),
        ("output_layer", "output_layer"),
        ("embedding.word_embeddings", "embedding"),
    ],
)
def test_a_module_belongs_to_its_layer(module: str, layer: str) -> None:
    assert layer_of(module) == layer
