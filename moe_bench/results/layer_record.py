"""One MoE layer as measured on one GPU: the whole, its parts, what is left over, and other engines beside it.

A file holds one case on one engine, `results/layer/<gpu>/<start>-<commit>-<job>.json`: raw seconds of every
sample. Medians, rates, residual and ratios are computed on read.
"""

from __future__ import annotations

import os
import re
import statistics
from pathlib import Path
from typing import Literal, TextIO

from pydantic import Field

from moe_bench.results.calibration import CPU, CalibrationProvenance
from moe_bench.results.journal import file_stem, gpu_folder
from moe_bench.results.layer_peers import LayerPeers
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.results.store import LAYER_FOLDER
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, Spec, Text
from moe_bench.spec.layer_case import LayerCase

SCHEMA_VERSION = 1

Pass = Literal["forward", "backward", "dgrad", "wgrad"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "dgrad", "wgrad")

MAX_RESIDUAL_FRACTION = 0.03
"""Beyond it parts and whole are not the same work, and the record says so."""
MAX_SPREAD_FRACTION = 0.01
"""Of repeats, from the quartiles; beyond it the record says that the machine was not quiet."""


class PartSamples(Spec):
    """One part in one pass: seconds within one call of the layer, those of parts inside it not counted."""

    part: Text
    in_pass: Pass
    """`backward` where the two gradients cannot be told apart, or for what is beside them."""
    samples_s: tuple[NonNegativeFloat, ...] = Field(min_length=1)

    @property
    def median_s(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_s)


class HeldSamples(Spec):
    """The same layer in bursts after pauses, and without a pause for so long."""

    held_for_s: PositiveFloat
    burst_s: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Mean call of each burst."""
    held_s: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Mean call of each window, in order."""
    end_sm_clock_hz: PositiveFloat | None = None

    @property
    def slowdown_fraction(self) -> float:
        """What holding adds to a burst's call, from the last half of the windows."""
        late = self.held_s[len(self.held_s) // 2 :]
        return statistics.median(late) / statistics.median(self.burst_s) - 1


def gated_flops(case: LayerCase, *, num_rows: int) -> int:
    """Forward operations of routed experts that get `num_rows` rows: 6 R d n, or 4 R d n without a gate.

    Two per weight and row, for gate, linear part and second projection (arXiv:2512.14080 counts T K = R).
    Router, shared experts and activation are left out; backward is twice that.
    """
    num_products = 3 if case.activation.is_gated else 2
    return 2 * num_products * num_rows * case.hidden_size * case.moe.expert_ffn_hidden_size


class LayerRecord(Spec):
    """One case on one engine, on one GPU or without one, written once."""

    schema_version: Literal[1] = 1
    is_tiny: bool = False
    """Whether sizes were toys: the file says that the command works, and nothing about rates."""
    suite: Text | None = None
    """Suite that the case belongs to; None for a recipe's layer."""
    provenance: CalibrationProvenance
    case: LayerCase
    engine: Text
    implementation: Text
    differences: tuple[Text, ...] = ()
    """What is otherwise than in a training step, as `dispatch is a copy on this GPU`."""
    local_tokens_per_expert: tuple[NonNegativeInt, ...]
    """Rows that each expert of this rank gets."""
    whole: WholeSamples
    marked: WholeSamples
    """Calls in which every part was marked; what they take longer is the cost of marking."""
    parts: tuple[PartSamples, ...] = Field(min_length=1)
    """In order of first appearance; sample n of each is of the same call."""
    unreachable: dict[str, str] = Field(default_factory=dict)
    """Parts that exist and could not be told apart, each with the reason."""
    peak_memory_bytes: NonNegativeInt | None = None
    """Most that torch had allocated during a call, weights and gradients included; None on a CPU."""
    copy_bytes_per_s: PositiveFloat | None = None
    """Read and written by a copy on this device, in this run; what byte floors are priced with."""
    dense_flops_per_s: PositiveFloat | None = None
    """Of one large dense matrix product in this run."""
    start_sm_clock_hz: PositiveFloat | None = None
    end_sm_clock_hz: PositiveFloat | None = None
    held: HeldSamples | None = None
    graphed: WholeSamples | None = None
    """The whole, both passes captured as CUDA graphs and replayed; null where that was not asked for."""
    peers: LayerPeers | None = None
    """Other engines on the same weights and inputs; null where none were asked for."""

    @property
    def parts_s(self) -> float:
        """What all parts of a call take together, the median over calls; not the sum of their medians, which
        is smaller where now one part and now another is late.
        """
        calls = zip(*(part.samples_s for part in self.parts), strict=True)
        return statistics.median(map(sum, calls))

    @property
    def residual_fraction(self) -> float:
        """Of the whole, what the parts do not account for; negative where they add up to more."""
        return 1 - self.parts_s / self.whole.median_s

    @property
    def marking_fraction(self) -> float:
        """What marking every part adds to a call."""
        return self.marked.median_s / self.whole.median_s - 1

    @property
    def launch_fraction(self) -> float | None:
        """Of the whole, what a replay of the same kernels does not take; None where none was captured."""
        return None if self.graphed is None else 1 - self.graphed.median_s / self.whole.median_s

    @property
    def marks(self) -> tuple[str, ...]:
        """What is to be said wherever this record is shown."""
        found = []
        if self.is_tiny or self.provenance.gpu.name == CPU:
            found.append("toy sizes or no GPU: says that the command works, nothing about rates")
        if abs(self.residual_fraction) > MAX_RESIDUAL_FRACTION:
            found.append(
                f"residual {self.residual_fraction:+.1%}: parts and whole differ by more than "
                f"{MAX_RESIDUAL_FRACTION:.0%}"
            )
        if self.whole.spread_fraction > MAX_SPREAD_FRACTION:
            found.append(f"spread {self.whole.spread_fraction:.1%}: more than {MAX_SPREAD_FRACTION:.0%}")
        return tuple(found)

    @property
    def forward_flops(self) -> int:
        """Of the routed experts' products."""
        return gated_flops(self.case, num_rows=sum(self.local_tokens_per_expert))

    @property
    def backward_flops(self) -> int:
        """Two gradients of every product."""
        return 2 * self.forward_flops

    @property
    def forward_flops_per_s(self) -> float:
        """Experts' products over the time of the whole layer."""
        return self.forward_flops / statistics.median(self.whole.forward_s)

    @property
    def backward_flops_per_s(self) -> float:
        """The same of the backward pass."""
        return self.backward_flops / statistics.median(self.whole.backward_s)


def write_layer_record(root: Path, record: LayerRecord) -> Path:
    """Write `record` to a new file and return its path; a name that is taken gets a number behind it."""
    where = record.provenance
    folder = gpu_folder(root, LAYER_FOLDER, where.gpu.name)
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(started_at=where.started_at, commit=where.git.short_name, job_id=where.job_id)
    content = record.model_dump_json() + "\n"
    with _new_file(folder, stem) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return Path(file.name)


def read_layer_record(path: Path) -> LayerRecord:
    """The record in `path`; RecordError names the file, the field and what is wrong with it."""
    return read_versioned(path, LayerRecord, what="layer record", version=SCHEMA_VERSION)


def layer_records(root: Path) -> tuple[LayerRecord, ...]:
    """All records of layers under `root`, by GPU and then in the order in which they were started."""
    return tuple(map(read_layer_record, sorted((root / LAYER_FOLDER).glob("*/*.json"), key=_order)))


def _order(path: Path) -> tuple[object, ...]:
    """Numbers by their value: a job's second file, `-2.json`, comes after its first and before its tenth."""
    words = re.split(r"(\d+)", path.stem)
    return path.parent.name, *(int(word) if word.isdigit() else word for word in words)


def _new_file(folder: Path, stem: str) -> TextIO:
    """`<stem>.json` opened for writing, or the first of `<stem>-2.json`, ... that nobody has."""
    number, path = 1, folder / f"{stem}.json"
    while True:
        try:
            return path.open("x", encoding="utf-8")
        except FileExistsError:
            number += 1
            path = folder / f"{stem}-{number}.json"
