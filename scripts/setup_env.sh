#!/usr/bin/env bash
# Install one set of pinned packages into .venv; does nothing when that is done already.
#   venv   .venv itself, with the Python that PYTHON names
#   build  torch, and the tools that build the ops against it
#   serve  vLLM, and what serving this plugin's models with it loads
#   dev    all else that vLLM requires, and the tools of the checks and the tests
# The sets share no package, so they can be installed at the same time, but for build and dev: a torch with CUDA brings
# triton. A set's stamp is written last, so an interrupted run is taken up by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "setup: $*" >&2
  exit 1
}

# All that is made lies in the checkout: .venv, the ops beside the package, and build/ with logs and pictures.
check_writable() {
  local folder
  for folder in . vllm_dllm packaging/vllm-alias build .venv; do
    [[ ! -e $folder || -w $folder ]] ||
      fail "cannot write to $(realpath "$folder"): .venv, the ops and build/ are made in the checkout;" \
        "make it writable, or clone it to a folder that is: git clone '$PWD' FOLDER"
  done
}

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")  # one, whose path may have blanks
  fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "found no Python 3.11, 3.12 or 3.13 (tried: ${candidates[*]});" \
    "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

# What `pip` installs loads it, and nothing that is needed to build brings it: without, vLLM's server ends minutes later.
check_libnuma() {
  "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "found no libnuma.so.1, without which vLLM cannot compute on a CPU;" \
      "install it (Debian: apt install libnuma1; Fedora: dnf install numactl-libs)"
}

make_venv() {
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    check_libnuma .venv/bin/python
    return
  fi
  local python
  python=$(find_python)
  check_libnuma "$python"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv or no ensurepip, which a virtual environment needs;" \
      "install them (Debian: apt install python3-venv), or name another Python: make setup PYTHON=..."
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# install_set NAME WHAT PIP_ARGUMENTS...
install_set() {
  local stamp=.venv/.$1 what=$2 wanted files=()
  shift 2
  mapfile -t files < <(printf '%s\n' "$@" | grep '\.txt$')
  wanted=$(cat "${files[@]}" scripts/setup_env.sh | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  rm -f "$stamp"
  echo "setup: installing $what"
  # Another set brings what this one lacks, and torch's CUDA build serves, too: pip's list of conflicts says nothing else.
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install -qq --no-compile --no-warn-conflicts "$@"
  echo "$wanted" >"$stamp"
  echo "setup: installed $what ($SECONDS s)"
}

case ${1:-} in
  venv)
    check_writable
    command -v "${CXX:-c++}" >/dev/null ||
      fail "found no C++ compiler '${CXX:-c++}'; install one (Debian: apt install g++), or set CXX"
    make_venv
    ;;
  # Resolved: a torch with CUDA requires packages that the pins do not name.
  build) install_set build "torch and the tools of the build" -r requirements/build.txt ;;
  serve) install_set serve "vLLM" --no-deps -r requirements/serve.txt ;;
  dev) install_set dev "the tools of the tests" --no-deps -r requirements/vllm.txt -r requirements/dev.txt ;;
  *) fail "'${1:-}' is no set of packages; allowed are venv, build, serve and dev" ;;
esac
