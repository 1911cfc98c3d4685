"""How well tables of products predict shapes that were left out of them, beside the law alone.

    pip install moe_bench[prior]
    python benchmarks/table_errors.py

Errors over products with 512 to 32,768 rows, columns and inner size. `shape`: one in twenty shapes left out
at a time. `site`: all row counts of one (columns, inner size) left out, as for a layer that nobody measured.
"""

from __future__ import annotations

import numpy as np
from fit_rates import MAX_SIZE, MIN_SIZE, measured_gpus, print_head

from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.nearest_shapes import Miss, NearestShapes
from moe_bench.projection.evidence.table_shapes import product_ratios
from moe_bench.projection.evidence.tables import Column, read_gemm_tables
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

NUM_FOLDS = 20
NUM_SITES = 60
NUM_TESTED = 1500
SEED = 0


def main() -> None:
    """Print one Markdown table, a line per GPU and number format."""
    print_head("GPU", "format", "shapes", "law %", "shape left out %", "site left out %")
    loader = Loader(root=recipes_root(), rules=())
    systems = [loader.system(path.stem) for path in sorted((recipes_root() / "systems").glob("*.yaml"))]
    measured = {gpu.device_name for gpu in measured_gpus()}
    for system in systems:
        if system.gpu is None or system.gpu.device_name not in measured:
            continue
        efficiency = Efficiency(system)
        for number, table in read_gemm_tables(system.gpu.device_name, engine="trtllm").items():
            sizes, ratios = map(np.array, product_ratios(system.gpu, number, table, efficiency.law_s))
            tested = (sizes.min(1) >= MIN_SIZE) & (sizes.max(1) <= MAX_SIZE)
            law = 1 / ratios[tested] - 1
            cells = (law, left_out_shapes(sizes, ratios, tested), left_out_sites(sizes, ratios, tested))
            print(
                f"| {system.gpu.device_name} | {number} | {tested.sum()} | {' | '.join(map(shown, cells))} |"
            )


def left_out_shapes(sizes: Column, ratios: Column, tested: Column) -> Column:
    """Relative errors of shapes predicted from nineteen twentieths of the others."""
    folds = np.random.default_rng(SEED).integers(NUM_FOLDS, size=len(ratios))
    return np.concatenate([errors(sizes, ratios, folds == fold, tested) for fold in range(NUM_FOLDS)])


def left_out_sites(sizes: Column, ratios: Column, tested: Column) -> Column:
    """Relative errors of whole sites, some of them drawn by chance."""
    _, site_of = np.unique(sizes[:, 1:], axis=0, return_inverse=True)
    drawn = np.random.default_rng(SEED).permutation(np.unique(site_of[tested]))[:NUM_SITES]
    return np.concatenate([errors(sizes, ratios, site_of == site, tested) for site in drawn])


def errors(sizes: Column, ratios: Column, is_out: Column, tested: Column) -> Column:
    """Predicted over measured, less one, of the tested shapes among those left out."""
    shapes = NearestShapes(sizes[~is_out], ratios[~is_out])
    asked = np.flatnonzero(is_out & tested)
    asked = np.random.default_rng(SEED).permutation(asked)[: NUM_TESTED // NUM_FOLDS]
    found = [(shapes.lookup(tuple(sizes[index])), ratios[index]) for index in asked]
    return np.array([answer / ratio - 1 for answer, ratio in found if not isinstance(answer, Miss)])


def shown(values: Column) -> str:
    """Median and 90th percentile of the absolute error."""
    return f"{100 * np.median(np.abs(values)):.1f} ({100 * np.quantile(np.abs(values), 0.9):.1f})"


if __name__ == "__main__":
    main()
