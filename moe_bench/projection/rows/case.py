"""What a rule reads when it fills a field that a published row leaves open, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_bench.projection.rows.stack import Stack, Suite
from moe_bench.results.published import PublishedRow
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.system import SystemSpec

Draft = Mapping[str, object]
"""Fields of a recipe by dotted name, as far as they are decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row, what it names, and the fields decided so far."""

    row: PublishedRow
    stack: Stack
    model: ModelSpec
    system: SystemSpec
    draft: Draft

    def number(self, field: str) -> int:
        """A size that was decided before."""
        value = self.draft[field]
        assert isinstance(value, int)  # noqa: S101 - rules stand in the order in which they read each other
        return value

    def has(self, field: str, *values: object) -> bool:
        """Whether `field` was decided and is one of `values`."""
        return field in self.draft and self.draft[field] in values

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return self.model.moe is not None

    @property
    def is_nvidia_suite(self) -> bool:
        """Whether NVIDIA tuned the run for its tables: Bridge and what came before it."""
        return self.stack.suite in (Suite.BRIDGE, Suite.NEMO)

    @property
    def is_nemo_yaml(self) -> bool:
        """Whether the run was configured by the YAML files of NeMo 24, as dgxc did up to 25.04."""
        return self.stack.suite is Suite.NEMO and self.stack.is_before(2025, 5)

    def is_model(self, *beginnings: str) -> bool:
        """Whether the model's key begins with one of `beginnings`."""
        return self.model.key.startswith(beginnings)

    def is_on(self, *gpus: str) -> bool:
        """Whether the row ran on one of these GPUs, as sources name them."""
        return self.row.hardware in gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one open field of a row is filled."""

    name: str
    field: str
    """Dotted name in `Recipe`."""
    when: str
    then: str
    evidence: str
    applies: Callable[[Case], bool]
    value: Callable[[Case], object]
    is_of_release: bool = False
    """Whether the evidence is the code of the row's own release; it then wins over a recipe for the row."""


def always(_: Case) -> bool:
    """The condition of a field's last rule."""
    return True


def constant(value: object) -> Callable[[Case], object]:
    """The value of a rule that does not depend on the row."""
    return lambda _: value
