#!/usr/bin/env bash
# Build the ops for the GPU at hand, test every kernel, look for faulty memory accesses, and measure: under 10 minutes.
# Needs torch with CUDA, numpy, pytest, cmake, nvcc and a GPU; neither vLLM nor the network. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds_per_tool=60

say() { echo "gpu_check: $* (${SECONDS} s)"; }

"$python" - <<'PYTHON'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"gpu_check: torch {torch.__version__} sees no CUDA device; run it on a GPU machine")
print(f"gpu_check: torch {torch.__version__}, {torch.cuda.get_device_name()}")
PYTHON

arch=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
export CMAKE_ARGS="-DDLLM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${arch/#90/90a} ${CMAKE_ARGS:-}"
"$python" setup.py --quiet build_ext --inplace --force --build-temp build/gpu_check
say "built for ${arch}"

"$python" -m pytest -q -m gpu tests/ops
say "every kernel test passed"

# Runs the kernel tests under a tool. Without torch's cache of memory, neighbours do not hide an overrun; a captured
# CUDA graph needs that cache. The tool's log has a header, and a line for each finding.
sanitize() {
  local status=0 log="build/gpu_check/$1.log"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$seconds_per_tool" \
    compute-sanitizer --tool "$1" --error-exitcode 1 --log-file "$log" --kernel-regex kns=4dllm4cuda \
    "$python" -m pytest -q -m gpu -k "not captured" tests/ops || status=$?
  if grep -vE 'COMPUTE-SANITIZER|SUMMARY: 0' "$log" || [[ $status != 0 && $status != 124 ]]; then
    say "$1 failed; its log is $log"
    exit 1
  fi
  if [[ $status == 124 ]]; then say "$1 found nothing until it was stopped"; else say "$1 found nothing"; fi
}

if ! command -v compute-sanitizer >/dev/null; then
  say "compute-sanitizer is not on PATH; memory accesses were not checked"
elif ! compute-sanitizer "$python" -c 'import torch; torch.zeros(1, device="cuda")' >/dev/null 2>&1; then
  say "compute-sanitizer does not work on this machine; memory accesses were not checked"
else
  for tool in memcheck racecheck initcheck synccheck; do
    sanitize "$tool"
  done
fi

"$python" -m benchmarks.kernels.gpu | tee build/gpu_check/kernels.md
say "measured; the tables are in build/gpu_check/kernels.md"
