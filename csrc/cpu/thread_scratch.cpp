#include "thread_scratch.h"

#include <cstddef>
#include <memory>
#include <new>

namespace dllm::cpu {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(::operator new(static_cast<std::size_t>(bytes), kCacheLine));
    size = bytes;
  }
  return memory.get();
}

}  // namespace dllm::cpu
