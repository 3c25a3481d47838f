#!/usr/bin/env bash
# The first run on a GPU, under 9 minutes: does it build, is it right at real shapes, how long does a step take.
# scripts/gpu_stages.sh says what it needs.
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
source "$(dirname "$0")/gpu_stages.sh"
first_stages
stage llada 70 step llada --drafts 0,3,5
stage sdar 60 step sdar --drafts 0,3,8
stage memcheck 50 sanitize memcheck
stage racecheck 50 sanitize racecheck
finish
