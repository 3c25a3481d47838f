#!/usr/bin/env bash
# Check what a wheel's library needs of the system, and give the wheel the tag of the oldest glibc that has it:
#   scripts/repair_wheel.sh WHEEL FOLDER
# torch comes with vLLM, and its OpenMP must be ours too: neither is put into the wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
auditwheel repair --exclude 'libtorch*.so' --exclude libgomp.so.1 --wheel-dir "$2" "$1"
