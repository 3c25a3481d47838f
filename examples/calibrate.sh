#!/usr/bin/env bash
# Make a draft graph for a model, a policy and your prompts, look at it, and write the settings that serve with it:
#   examples/calibrate.sh examples/tiny_llada/checkpoint examples/tiny_llada/questions.jsonl tiny --gen-length 64
# Makes tiny.json (the graph), tiny.svg (its picture) and tiny.spiffy.json. What stands behind the three arguments goes to
# `vllm-dllm calibrate`; the policy is that of the server unless named there.
set -euo pipefail
model=$1 prompts=$2 name=$3
shift 3

vllm-dllm calibrate "$model" --prompts "$prompts" -o "$name.json" --picture "$name.svg" "$@"
vllm-dllm graph show "$name.json"
vllm-dllm graph check "$name.json" --model "$model"

echo "{\"method\": \"spiffy\", \"draft_graph\": \"$(basename "$name").json\"}" >"$name.spiffy.json"
echo "serve with it: vllm serve $model --speculative-config $name.spiffy.json"
