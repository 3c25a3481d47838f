#!/usr/bin/env bash
# Build the ops for the GPU at hand and compare each CUDA kernel with its CPU twin.
# Needs torch with CUDA, pytest, cmake, nvcc and a GPU; neither vLLM nor the network. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" - <<'EOF'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"gpu_check: torch {torch.__version__} sees no CUDA device; run it on a GPU machine")
print(f"gpu_check: torch {torch.__version__}, {torch.cuda.get_device_name()}")
EOF

arch=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
export CMAKE_ARGS="-DDLLM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${arch/#90/90a} ${CMAKE_ARGS:-}"
"$python" setup.py --quiet build_ext --inplace --force --build-temp build/gpu_check
"$python" -m pytest -q -m gpu tests/ops

if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q -m gpu -k small tests/ops
else
  echo "gpu_check: compute-sanitizer is not on PATH; memory accesses were not checked"
fi
