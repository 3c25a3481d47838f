#!/usr/bin/env bash
# Make .venv: a Python with the pinned CPU build of vLLM and the tools. Does nothing when that is done already.
# PYTHON chooses the interpreter. The stamp is written last, so an interrupted run is taken up by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "setup: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "found no Python 3.11, 3.12 or 3.13 (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3});" \
    "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

stamp=.venv/.requirements
wanted=$(cat requirements/*.txt packaging/vllm-alias/pyproject.toml scripts/setup_env.sh | cksum)
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi

command -v "${CXX:-c++}" >/dev/null || fail "found no C++ compiler '${CXX:-c++}'; install one (Debian: apt install g++), or set CXX"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv or no ensurepip, which a virtual environment needs;" \
      "install them (Debian: apt install python3-venv), or name another Python: make setup PYTHON=..."
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
pip=(.venv/bin/python -m pip install -qq --no-compile)
rm -f "$stamp"
echo "setup: installing the pinned packages (about two minutes)"
"${pip[@]}" -r requirements/cpu.txt -r requirements/dev.txt
"${pip[@]}" --no-deps -r requirements/cpu-no-deps.txt
"${pip[@]}" --no-deps --no-build-isolation packaging/vllm-alias
rm -rf packaging/vllm-alias/build packaging/vllm-alias/*.egg-info
echo "$wanted" >"$stamp"
