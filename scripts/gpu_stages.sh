# The stages of scripts/gpu_first.sh and scripts/gpu_check.sh, which source this file. Each stage has a time limit of its own and
# a log in $OUT, and one that fails stops no other. Needs torch with CUDA, numpy, pytest, cmake, ninja, nvcc and a GPU;
# neither vLLM nor the network.
#   OUT       folder of the logs and of summary.txt; build/gpu unless set
#   PYTHON    the interpreter
#   SECONDS_IN_ALL  after which nothing is begun or goes on
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export OUT=${OUT:-$PWD/build/gpu} PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export BUILD=${BUILD:-$PWD/build/gpu_ops} VLLM_DLLM_LIBRARY=${VLLM_DLLM_LIBRARY:-${BUILD:-$PWD/build/gpu_ops}/_C.so}
mkdir -p "$OUT"
: >"$OUT/summary.txt"
failed=()

# stage NAME LIMIT COMMAND...: run a command, of this file or a program, for LIMIT seconds at most.
stage() {
  local name=$1 limit=$2 begin=$SECONDS left status=0
  shift 2
  left=$((SECONDS_IN_ALL - SECONDS - 6))
  ((limit > left)) && limit=$left
  if ((limit <= 0)); then
    echo "== $name: not run, no time is left" | tee -a "$OUT/summary.txt"
    failed+=("$name")
    return
  fi
  STAGE_LIMIT=$limit timeout -k 5 "$limit" bash -c '"$@"' bash "$@" >"$OUT/$name.log" 2>&1 </dev/null || status=$?
  case $status in
    0) echo "== $name: ok ($((SECONDS - begin)) s)" ;;
    124 | 137) echo "== $name: STOPPED after its $limit s" ;;
    *) echo "== $name: FAILED with exit status $status ($((SECONDS - begin)) s)" ;;
  esac | tee -a "$OUT/summary.txt"
  ((status == 0)) || failed+=("$name")
  tail -n 16 "$OUT/$name.log"
}

# The last line of a script: its exit status says whether all stages passed.
finish() {
  if ((${#failed[@]})); then
    echo "gpu: ${#failed[@]} stages failed: ${failed[*]}; logs are in $OUT (${SECONDS} s)" | tee -a "$OUT/summary.txt"
    exit 1
  fi
  echo "gpu: every stage passed; logs are in $OUT (${SECONDS} s)" | tee -a "$OUT/summary.txt"
}

machine() {
  nvidia-smi
  nvcc --version
  "$PYTHON" -c 'import sys, torch
print(sys.version, torch.__version__, torch.version.cuda)
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA device; run this on a GPU machine")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
}

# cmake directly: setup.py wants a setuptools that a GPU machine may not have.
build() {
  local arch torch
  torch=$("$PYTHON" -c 'import torch; print(torch.__path__[0])') || return
  arch=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || return
  cmake -S . -B "$BUILD" -GNinja -DCMAKE_BUILD_TYPE=Release -DDLLM_CUDA=ON -DDLLM_ISAS=native -DTORCH_DIR="$torch" \
    -DCMAKE_CUDA_ARCHITECTURES="${arch/#90/90a}" && cmake --build "$BUILD" --target _C
}

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/ops; }
self_test() { "$PYTHON" -m vllm_dllm.self_test; }
shapes() { "$PYTHON" scripts/gpu_shapes.py; }
step() { "$PYTHON" scripts/gpu_step.py "$@"; }
kernels() { "$PYTHON" -m benchmarks.kernels.gpu; }

# sanitize TOOL: run the kernel tests under a tool of compute-sanitizer, as many as fit into the stage's limit. Without torch's
# cache of memory neighbours do not hide an overrun; a captured CUDA graph needs that cache. The tool's own log has a header,
# and lines for each finding.
sanitize() {
  local tool=$1 log=$OUT/$1.findings status=0 filter=--kernel-name
  compute-sanitizer --help | grep -q -e --kernel-name || filter=--kernel-regex # its older name
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 3 $((STAGE_LIMIT - 6)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --log-file "$log" "$filter" kns=4dllm4cuda "$PYTHON" -m pytest -q -x -p no:cacheprovider -m gpu -k "not captured" \
    tests/ops || status=$?
  cat "$log"
  if [[ $status == 124 ]]; then
    grep -qvE 'COMPUTE-SANITIZER|SUMMARY: 0|^=* *$' "$log" && return 9
    echo "$tool found nothing until it was stopped"
    return 0
  fi
  return "$status"
}
export -f machine build tests self_test shapes step kernels sanitize
