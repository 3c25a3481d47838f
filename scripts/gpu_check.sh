#!/usr/bin/env bash
# The long list for a GPU at hand, under 10 minutes: build, test every kernel, look for faulty memory accesses, measure.
# scripts/gpu_stages.sh says what it needs; scripts/gpu_first.sh is for a machine where nothing has run yet.
SECONDS_IN_ALL=${SECONDS_IN_ALL:-585}
source "$(dirname "$0")/gpu_stages.sh"
first_stages
for tool in memcheck racecheck initcheck synccheck; do
  stage "$tool" 45 sanitize "$tool"
done
stage llada 50 step llada --batches 1,4 --drafts 0,3,5,8
stage sdar 50 step sdar --batches 1,4 --drafts 0,3,5,8
stage kernels 150 kernels
finish
