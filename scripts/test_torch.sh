#!/usr/bin/env bash
# Build the ops against another torch and run the tests that need no vLLM with it: scripts/test_torch.sh VERSION.
# The environment is build/torch-VERSION; it is made once, and the other packages in it are of the versions of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?give a version of torch, for example: scripts/test_torch.sh 2.10.0}
env=$PWD/build/torch-$version
python=$env/bin/python
tests=(tests/{ops,attention,calibrate,draft,self_test,unmask} tests/state/test_canvas.py tests/engine/test_plan.py)
tests+=(tests/test_noise.py tests/test_gpu_scripts.py)

say() { echo "test_torch $version: $* (${SECONDS} s)"; }

if [[ ! -f $env/.made ]]; then
  .venv/bin/python -m venv --clear "$env"
  mapfile -t others < <(grep -hE '^(cmake|ninja|numpy|pydantic|safetensors|tokenizers|pytest|pytest-xdist|hypothesis)==' \
    requirements/*.txt)
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install -q --no-compile --no-cache-dir \
    "torch==$version" "${others[@]}"
  touch "$env/.made"
fi
say "$("$python" -c 'import torch; print("torch", torch.__version__)') is in $(du -sh "$env" | cut -f1)"

torch=$("$python" -c 'import torch; print(torch.__path__[0])')
"$env/bin/cmake" -S . -B "$env/ops" -GNinja -DCMAKE_MAKE_PROGRAM="$env/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
  -DDLLM_CUDA=OFF -DDLLM_ISAS=native -DTORCH_DIR="$torch" >/dev/null
"$env/bin/cmake" --build "$env/ops" --target _C >"$env/build.log" || { cat "$env/build.log"; exit 1; }
say "built the ops"

export VLLM_DLLM_LIBRARY=$env/ops/_C.so VLLM_DLLM_SIMT_BUILD=$env/simt
"$python" -m pytest -q -n "${WORKERS:-2}" --dist loadgroup --no-loadscope-reorder --slow kernels,cases -m "not engine" \
  "${tests[@]}" "${@:2}"
say "passed"
