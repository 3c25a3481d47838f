// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>

namespace dllm::cpu {

// The calling thread's scratch: `bytes` or more, aligned to a cache line, its content undefined. Valid until the next
// call on this thread.
void* thread_scratch(int64_t bytes);

}  // namespace dllm::cpu
