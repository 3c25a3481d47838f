// Prints the best instruction set of this machine: what CMake's DLLM_ISAS=native stands for.
#include <cstdio>

#include "../cpu/isa.h"

int main() { std::puts(dllm::cpu::name_of(dllm::cpu::machine_isa())); }
