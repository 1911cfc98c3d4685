#!/usr/bin/env bash
# Installs one part of the moe_bench image; the Dockerfile and the Apptainer definition call the same parts.
#
#   install.sh nccl | nvshmem | python_packages | apex | deep_ep | moe_bench | verify
#
# Versions come from the environment under the names of `build_arg` in pins.yaml; a missing one stops the build.
set -euo pipefail

# The base image pins its own Python packages for pip; pins.yaml replaces some of them on purpose.
export PIP_CONSTRAINT=""
export PIP_NO_CACHE_DIR=1
export PIP_ROOT_USER_ACTION=ignore

# Hopper, and Blackwell (10.0 runs on 10.3): every GPU under recipes/systems.
export TORCH_CUDA_ARCH_LIST="9.0 10.0"

cuda_home=/usr/local/cuda
rdma_core_home=/opt/rdma-core
# A build host has no NVIDIA driver. Linking and importing go against the toolkit's stubs; on a cluster the
# container runtime mounts the driver's own libraries, and nothing here is on the library path any more.
driver_stubs=/opt/driver_stubs

link_driver_stubs() {
  mkdir -p "$driver_stubs"
  ln -sf "$cuda_home/lib64/stubs/libcuda.so" "$driver_stubs/libcuda.so.1"
  ln -sf "$cuda_home/lib64/stubs/libcuda.so" "$driver_stubs/libcuda.so"
  ln -sf "$cuda_home/lib64/stubs/libnvidia-ml.so" "$driver_stubs/libnvidia-ml.so.1"
}

install_nccl() {
  local repository_arch deb
  case "$(uname -m)" in
    x86_64) repository_arch=x86_64 ;;
    aarch64) repository_arch=sbsa ;;
    *) echo "install.sh: no NCCL packages for $(uname -m)" >&2; exit 3 ;;
  esac
  deb="$(mktemp --suffix=.deb)"
  curl -fsSL -o "$deb" \
    "https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/$repository_arch/cuda-keyring_1.1-1_all.deb"
  dpkg -i "$deb"
  rm "$deb"
  apt-get update
  apt-get install -y --no-install-recommends --allow-change-held-packages --allow-downgrades \
    "libnccl2=$NCCL_VERSION" "libnccl-dev=$NCCL_VERSION"
  rm -rf /var/lib/apt/lists/*
}

install_nvshmem() {
  local lib
  pip install "nvidia-nvshmem-cu13==$NVSHMEM_VERSION"
  lib="$(python -c 'import nvidia.nvshmem as n; print(next(iter(n.__path__)))')/lib"
  # The wheel holds the versioned name only; fabric handles are looked up under the plain one.
  ln -sf libnvshmem_host.so.3 "$lib/libnvshmem_host.so"
}

install_python_packages() {
  pip uninstall -y transformer-engine transformer-engine-torch transformer-engine-cu13
  # Built here rather than fetched prebuilt: the extension must match the base's torch, which is no PyPI release.
  NVTE_PYTORCH_FORCE_BUILD=TRUE pip install --no-build-isolation \
    "transformer_engine[pytorch,core_cu13]==$TRANSFORMER_ENGINE_VERSION" \
    "megatron-core==$MEGATRON_CORE_VERSION" \
    "nvidia-modelopt==$MODELOPT_VERSION"
}

install_apex() {
  pip uninstall -y apex
  APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_NCCL_ALLOCATOR=1 APEX_PARALLEL_BUILD=8 \
    pip install --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@$APEX_COMMIT"
}

install_deep_ep() {
  local library_arch
  library_arch="$(dpkg-architecture -qDEB_HOST_MULTIARCH)"
  apt-get update
  apt-get install -y --no-install-recommends --allow-change-held-packages rdma-core libibverbs-dev
  rm -rf /var/lib/apt/lists/*
  test -e "/usr/lib/$library_arch/libmlx5.so" || ln -s libmlx5.so.1 "/usr/lib/$library_arch/libmlx5.so"
  # HybridEP compiles kernels at run time against this path, so it stays in the image.
  mkdir -p "$rdma_core_home"
  ln -sfn /usr/include "$rdma_core_home/include"
  ln -sfn "/usr/lib/$library_arch" "$rdma_core_home/lib"
  link_driver_stubs
  # CUDA 13 moved libcu++ under include/cccl, where DeepEP at this commit does not look.
  HYBRID_EP_MULTINODE=1 RDMA_CORE_HOME="$rdma_core_home" \
    CPLUS_INCLUDE_PATH="$cuda_home/include/cccl" \
    LIBRARY_PATH="$driver_stubs:$cuda_home/lib64/stubs" \
    pip install --no-build-isolation "deep_ep @ git+https://github.com/deepseek-ai/DeepEP@$DEEPEP_COMMIT"
}

install_moe_bench() {
  pip install /opt/moe_bench
}

verify() {
  link_driver_stubs
  LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$driver_stubs" python /opt/moe_bench/containers/verify.py
  moe-bench --version
  rm -rf "$driver_stubs"
}

case "${1:-}" in
  nccl) install_nccl ;;
  nvshmem) install_nvshmem ;;
  python_packages) install_python_packages ;;
  apex) install_apex ;;
  deep_ep) install_deep_ep ;;
  moe_bench) install_moe_bench ;;
  verify) verify ;;
  *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
