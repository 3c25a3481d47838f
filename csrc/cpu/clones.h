// DLLM_CLONES compiles a function once per x86-64 level; the loader takes the one for the CPU at hand.
// It marks the function that holds the inner loop: a caller's OpenMP region does not inherit it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLLM_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DLLM_CLONES
#endif
