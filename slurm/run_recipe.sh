#!/usr/bin/env bash
# Takes a recipe to a result: on this machine, or through Slurm on as many nodes as it needs.
#
#   bash slurm/run_recipe.sh RECIPE [options]    run here what this machine allows
#   sbatch slurm/run_recipe.sh RECIPE [options]  run the recipe as it stands, on the nodes that it needs
#   bash slurm/run_recipe.sh --environment-only  only make the environment, where compute nodes have no network
#
# The options are those of `moe-bench run` (here) and `moe-bench submit` (Slurm). Variables that are read:
#   MOE_BENCH_PYTHON  interpreter that has moe_bench installed; without it the script makes .venv in the repository
#   MOE_BENCH_WAIT=1  with sbatch: stay until the sized job has ended, and end with its exit code
#
#SBATCH --job-name=moe_bench_submit
set -euo pipefail

readonly NEEDS_GIB=10 # measured with torch 2.15: 8.3 GiB while pip unpacks its archives, 5.5 GiB afterwards

say() { printf 'run_recipe: %s\n' "$*" >&2; }
die() {
    local -r code=$1
    shift
    say "$*"
    exit "$code"
}

# Slurm runs a copy of this script, away from the repository: then the job's Command= names the original.
in_batch_job() { [[ -n ${SLURM_JOB_ID:-} && $(basename "$0") == slurm_script ]]; }

this_script() {
    if ! in_batch_job; then
        printf '%s\n' "${BASH_SOURCE[0]}"
        return
    fi
    local line command=
    while IFS= read -r line; do
        [[ $line =~ ^\ *Command=(.*)$ ]] && command=${BASH_REMATCH[1]}
    done < <(scontrol show job "$SLURM_JOB_ID")
    # what follows the script's name are its arguments
    [[ $command == *run_recipe.sh* ]] || die 3 "job $SLURM_JOB_ID does not say which script it runs: Command=$command"
    printf '%srun_recipe.sh\n' "${command%%run_recipe.sh*}"
}

# Empty where the script belongs to an installed wheel.
find_repository() {
    local script
    script=$(this_script)
    script=$(readlink -f "$script")
    repository=$(dirname "$(dirname "$script")")
    [[ -f $repository/pyproject.toml ]] && return
    repository=
    [[ -n ${MOE_BENCH_PYTHON:-} ]] ||
        die 3 "$script does not stand in a checkout of moe_bench; set MOE_BENCH_PYTHON to an installation of it"
}

# Prints the path of an interpreter. In the repository, because pyenv reads .python-version where it is called.
find_python() {
    cd "$repository"
    local candidate
    for candidate in python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    die 3 "no Python >= 3.12 here (tried python3.12, python3.13, python3, python); Megatron-Core needs it"
}

require_disk_space() {
    local free_kib
    free_kib=$(df -Pk "$repository" | awk 'NR == 2 { print $4 }')
    ((free_kib >= NEEDS_GIB * 1024 * 1024)) ||
        die 3 "$repository has $((free_kib / 1024 / 1024)) GiB free, the environment needs $NEEDS_GIB GiB"
}

# .venv/pyproject.toml is the stamp: the dependencies that the environment was made for, written last.
make_environment() {
    local -r venv=$repository/.venv
    local python pip
    python=$venv/bin/python
    mkdir -p "$venv"
    exec {lock}>"$venv/lock"
    flock "$lock"
    if ! cmp -s "$repository/pyproject.toml" "$venv/pyproject.toml"; then
        require_disk_space
        local found
        found=$(find_python)
        say "making $venv with $("$found" --version) (once; a few minutes, $NEEDS_GIB GiB)"
        if "$found" -c 'import ensurepip' 2>/dev/null; then
            "$found" -m venv "$venv"
            pip=("$python" -m pip)
        else # Debian without python3-venv
            "$found" -m venv --without-pip "$venv"
            pip=("$found" -m pip --python "$python")
        fi
        mkdir -p "$venv/tmp"
        TMPDIR=$venv/tmp "${pip[@]}" install --quiet --no-cache-dir --disable-pip-version-check --editable "$repository" ||
            die 3 "pip could not install moe_bench; where this machine has no network, run" \
                "\`bash $repository/slurm/run_recipe.sh --environment-only\` on one that has it"
        rmdir "$venv/tmp"
        cp "$repository/pyproject.toml" "$venv/pyproject.toml"
    fi
    exec {lock}>&-
    MOE_BENCH_PYTHON=$python
}

num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local visible
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        printf '%s\n' "${#visible[@]}"
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
    fi
}

scale_for_this_machine() {
    local gpus
    gpus=$(num_gpus)
    if ((gpus == 0)); then
        say "no GPU here (nvidia-smi lists none): --scale smoke, the recipe's structure at toy size on CPU cores;" \
            "its speed says nothing about a GPU"
        scale=(--scale smoke)
    else
        say "$gpus GPU(s) here: --scale node --num-gpus $gpus, real widths and kernels with as many layers as fit;" \
            "the whole recipe runs with \`sbatch slurm/run_recipe.sh $1\`"
        scale=(--scale node --num-gpus "$gpus")
    fi
}

main() {
    (($# > 0)) || die 2 "usage: bash slurm/run_recipe.sh RECIPE [options], or sbatch in place of bash"
    find_repository
    [[ -n ${MOE_BENCH_PYTHON:-} ]] || make_environment
    [[ $1 != --environment-only ]] || exit 0
    # the code beside this script runs, whatever else is installed
    [[ -z $repository ]] || export PYTHONPATH=$repository
    # what Megatron-Core compiles at run time looks for `ninja`, which pip puts beside the interpreter
    export PATH=$PATH:${MOE_BENCH_PYTHON%/*}
    export PYTHONUNBUFFERED=1
    if in_batch_job; then
        local wait=()
        [[ ${MOE_BENCH_WAIT:-} != 1 ]] || wait=(--wait)
        exec "$MOE_BENCH_PYTHON" -m moe_bench submit --inside-job "${wait[@]}" "$@"
    fi
    local scale=()
    [[ " $* " == *' --scale'* ]] || scale_for_this_machine "$1"
    exec "$MOE_BENCH_PYTHON" -m moe_bench run "$@" "${scale[@]}"
}

main "$@"
