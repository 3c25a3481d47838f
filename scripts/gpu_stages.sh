# The stages of scripts/gpu_first.sh and scripts/gpu_check.sh, which source this file. Each stage has a time limit of its own and
# a log in $LOGS, and one that fails stops no other. Needs torch with CUDA, numpy, pytest, cmake, ninja, nvcc and a GPU;
# neither vLLM nor the network.
#   OUT       folder of summary.txt and of all.log, all logs one after another; build/gpu unless set
#   LOGS      folder of the log of each stage
#   PYTHON    the interpreter
#   SECONDS_IN_ALL  after which nothing is begun or goes on
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export OUT=${OUT:-$PWD/build/gpu} LOGS=${LOGS:-$PWD/build/gpu_logs} PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export BUILD=${BUILD:-$PWD/build/gpu_ops} VLLM_DLLM_LIBRARY=${VLLM_DLLM_LIBRARY:-${BUILD:-$PWD/build/gpu_ops}/_C.so}
mkdir -p "$OUT" "$LOGS"
: >"$OUT/summary.txt"
: >"$OUT/all.log"
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
  STAGE_LIMIT=$limit timeout -k 5 "$limit" bash -c '"$@"' bash "$@" >"$LOGS/$name.log" 2>&1 </dev/null || status=$?
  case $status in
    0) echo "== $name: ok ($((SECONDS - begin)) s)" ;;
    124 | 137) echo "== $name: STOPPED after its $limit s" ;;
    *) echo "== $name: FAILED with exit status $status ($((SECONDS - begin)) s)" ;;
  esac | tee -a "$OUT/summary.txt"
  ((status == 0)) || failed+=("$name")
  { tail -n 1 "$OUT/summary.txt"; cat "$LOGS/$name.log"; } >>"$OUT/all.log"
  tail -n 16 "$LOGS/$name.log"
}

# What every script begins with: does it build, and is it right.
first_stages() {
  stage machine 30 machine
  stage build 160 build
  stage self_test 100 self_test
  stage tests 90 tests
  stage shapes 60 shapes
}

# The last line of a script: its exit status says whether all stages passed.
finish() {
  if ((${#failed[@]})); then
    echo "gpu: ${#failed[@]} stages failed: ${failed[*]}; logs are in $LOGS and $OUT (${SECONDS} s)" | tee -a "$OUT/summary.txt"
    exit 1
  fi
  echo "gpu: every stage passed; logs are in $LOGS and $OUT (${SECONDS} s)" | tee -a "$OUT/summary.txt"
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

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider --slow cases -m gpu tests/ops; }
self_test() { "$PYTHON" -m vllm_dllm.self_test; }
shapes() { "$PYTHON" scripts/gpu_shapes.py; }
step() { "$PYTHON" scripts/gpu_step.py "$@"; }
kernels() { "$PYTHON" -m benchmarks.kernels.gpu; }

# sanitize TOOL: run the kernel tests under a tool of compute-sanitizer, attention first, as many as fit into the stage's limit;
# it fails where none passed. Without torch's cache of memory neighbours do not hide an overrun; a captured CUDA graph needs
# that cache. The tool's own log has a header, and lines for each finding.
sanitize() {
  local tool=$1 log=$LOGS/$1.findings status filter=--kernel-name
  if ((STAGE_LIMIT < 8)); then
    echo "$STAGE_LIMIT s are too few to begin with"
    return 9
  fi
  compute-sanitizer --help | grep -q -e --kernel-name || filter=--kernel-regex # its older name
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 3 $((STAGE_LIMIT - 6)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --log-file "$log" "$filter" kns=4dllm4cuda "$PYTHON" -m pytest -v -p no:cacheprovider -m gpu -k "not captured" \
    tests/ops/test_draft_graph_attention_simt.py tests/ops | tee "$LOGS/$tool.tests"
  status=${PIPESTATUS[0]}
  cat "$log"
  if ! grep -q PASSED "$LOGS/$tool.tests"; then
    echo "no test passed under $tool"
    return 9
  fi
  if [[ $status == 124 || $status == 137 ]]; then
    grep -qvE 'COMPUTE-SANITIZER|SUMMARY: 0|^=* *$' "$log" && return 9
    echo "$tool found nothing until it was stopped"
    return 0
  fi
  return "$status"
}
export -f machine build tests self_test shapes step kernels sanitize
