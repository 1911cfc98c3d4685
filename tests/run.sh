#!/usr/bin/env bash
# Runs every check of the repository on this machine: format, lint, types, tests. Arguments go to pytest.
#
#   bash tests/run.sh              all tests but those marked slow or gpu
#   bash tests/run.sh -m slow      those that do not fit the budget of the default run
#   bash tests/run.sh -m gpu -n 0  those that need a GPU, one after the other
#
# As many workers as cores share the tests; MOE_BENCH_TEST_WORKERS changes that.
# MOE_BENCH_PYTHON names an interpreter to use; without it, .venv in the repository is made or brought up to date.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${MOE_BENCH_PYTHON:-} ]]; then
    bash slurm/run_recipe.sh --environment-only
    MOE_BENCH_PYTHON=$PWD/.venv/bin/python
    "$MOE_BENCH_PYTHON" -m pip install --quiet --no-cache-dir --editable '.[test]'
fi

"$MOE_BENCH_PYTHON" -m ruff format --check .
"$MOE_BENCH_PYTHON" -m ruff check .
"$MOE_BENCH_PYTHON" -m mypy
"$(dirname "$MOE_BENCH_PYTHON")/shellcheck" slurm/*.sh tests/*.sh .ci/run
OMP_NUM_THREADS=1 "$MOE_BENCH_PYTHON" -m pytest --numprocesses "${MOE_BENCH_TEST_WORKERS:-$(nproc)}" --dist loadgroup --no-loadscope-reorder "$@"
