#include "simt.h"

#include <csetjmp>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dllm::simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kPoison = 0xff;  // NaN in each floating-point type, -1 in each integer

enum class State { kReady, kAtWarp, kAtCta, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zero_bytes;
};

// A stack and where its owner left off. _setjmp and _longjmp make no system call, which swapcontext does.
struct Context {
  jmp_buf where;
  const void* stack = nullptr;  // nullptr: the stack of the caller of run
  size_t stack_bytes = 0;
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kDone;
  const char* operation = "";  // that it waits at
  size_t num_exchanges = 0;
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> open_group;
};

struct Warp {
  alignas(16) std::byte values[2][kWarp][kMaxExchange];  // by parity: a fast lane hands over before a slow one has read
};

struct Cta {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<std::byte[]> dynamic;
  std::map<const void*, std::unique_ptr<std::byte[]>> variables;
  size_t num_threads = 0;
  unsigned running = 0;
  const std::function<void()>* body = nullptr;
  uint32_t random = 0;
  std::optional<std::string> fault;
};

Cta cta;
Context scheduler;

Thread& self() { return cta.threads[cta.running]; }

// What AddressSanitizer must know of a switch: before it the stack to come, after it the stack that was.
void before_switch([[maybe_unused]] const Context& to, [[maybe_unused]] void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to.stack, to.stack_bytes);
#endif
}

void after_switch([[maybe_unused]] const Context& arrived, [[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const bool from_scheduler = &arrived != &scheduler;
  __sanitizer_finish_switch_fiber(fake_stack, from_scheduler ? &scheduler.stack : nullptr,
                                  from_scheduler ? &scheduler.stack_bytes : nullptr);
#endif
}

// Leave the running context for another; returns when another switches back.
void switch_to(Context& from, Context& to) {
  void* fake_stack = nullptr;
  before_switch(to, &fake_stack);
  if (_setjmp(from.where) == 0) {
    _longjmp(to.where, 1);
  }
  after_switch(from, fake_stack);
}

void wait(State state, const char* operation) {
  self().state = state;
  self().operation = operation;
  switch_to(self().context, scheduler);
}

void check_no_copies() {
  const auto holds_copies = [](const std::vector<Copy>& group) { return !group.empty(); };
  if (holds_copies(self().open_group) || std::any_of(self().groups.begin(), self().groups.end(), holds_copies)) {
    fail("the thread ends with copies that it never waited for");
  }
  self().groups.clear();
}

// A fiber serves one CTA after the other.
void serve() {
  after_switch(self().context, nullptr);
  switch_to(self().context, scheduler);
  for (;;) {
    (*cta.body)();
    check_no_copies();
    wait(State::kDone, "its end");
  }
}

void add_thread() {
  cta.running = cta.threads.size();
  Thread& thread = cta.threads.emplace_back();
  thread.context.stack = thread.stack.get();
  thread.context.stack_bytes = kStackBytes;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = thread.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, serve, 0);
  void* fake_stack = nullptr;
  before_switch(thread.context, &fake_stack);
  if (_setjmp(scheduler.where) == 0) {
    setcontext(&start);
  }
  after_switch(scheduler, fake_stack);
}

void set_fault(const std::string& text) {
  const auto [x, y, z] = blockIdx;
  cta.fault = "simt: CTA (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "): " + text;
}

// The order of turns varies, always in the same way: a missing barrier shows in one of them.
uint32_t random(uint32_t count) {
  cta.random = cta.random * 1664525u + 1013904223u;
  return (cta.random >> 16) % count;
}

unsigned first_of(size_t warp) { return static_cast<unsigned>(warp) * kWarp; }

bool all_wait_alike(size_t warp) {
  const Thread* lanes = &cta.threads[first_of(warp)];
  return std::all_of(lanes, lanes + kWarp, [&](const Thread& thread) {
    return thread.state == lanes[0].state && std::strcmp(thread.operation, lanes[0].operation) == 0;
  });
}

void fail_divergence(size_t first, size_t count) {
  std::string text = "threads of one barrier wait at different places:";
  std::map<std::string, unsigned> places;
  for (size_t i = first; i < first + count; ++i) {
    places.emplace(cta.threads[i].operation, i);
  }
  for (const auto& [operation, thread] : places) {
    text += " thread " + std::to_string(thread) + " at " + operation + ",";
  }
  text.back() = ';';
  set_fault(text + " all of a warp, or of a CTA, must come to the same");
}

// Run a warp until its lanes have ended or wait for the CTA.
void run_warp(size_t warp) {
  while (!cta.fault) {
    const bool backward = random(2) == 1;
    for (unsigned i = 0; i < kWarp; ++i) {
      cta.running = first_of(warp) + (backward ? kWarp - 1 - i : i);
      if (self().state == State::kReady) {
        threadIdx.x = cta.running;
        switch_to(scheduler, self().context);
      }
      if (cta.fault) {
        return;
      }
    }
    const State state = cta.threads[first_of(warp)].state;
    if (!all_wait_alike(warp)) {
      fail_divergence(first_of(warp), kWarp);
    } else if (state != State::kAtWarp) {
      return;
    } else {
      std::for_each_n(&cta.threads[first_of(warp)], kWarp, [](Thread& thread) { thread.state = State::kReady; });
    }
  }
}

void run_cta(size_t shared_bytes) {
  cta.dynamic.reset(new std::byte[shared_bytes]);
  std::memset(cta.dynamic.get(), kPoison, shared_bytes);
  cta.variables.clear();
  const size_t num_warps = cta.num_threads / kWarp;
  State state = State::kAtCta;
  while (state == State::kAtCta && !cta.fault) {
    std::for_each_n(cta.threads.begin(), cta.num_threads, [](Thread& thread) { thread.state = State::kReady; });
    // One warp after the other as far as it gets: the most that warps can be apart.
    for (size_t i = 0, first = random(num_warps); i < num_warps && !cta.fault; ++i) {
      run_warp((first + i) % num_warps);
    }
    state = cta.threads[0].state;
    for (size_t warp = 1; warp < num_warps && !cta.fault; ++warp) {
      if (cta.threads[first_of(warp)].state != state) {
        fail_divergence(0, cta.num_threads);
      }
    }
  }
}

void run_grid(dim3 grid, size_t shared_bytes) {
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x && !cta.fault; ++blockIdx.x) {
        run_cta(shared_bytes);
      }
    }
  }
}

}  // namespace

const char* run(dim3 grid, unsigned num_threads, size_t shared_bytes, const std::function<void()>& thread) {
  static std::string last_fault;
  if (num_threads == 0 || num_threads % kWarp != 0 || num_threads > 1024) {
    return "simt: a CTA must be 1 to 32 full warps";
  }
  cta.threads.reserve(1024);
  while (cta.threads.size() < num_threads) {
    add_thread();
  }
  cta.warps.resize(num_threads / kWarp);
  cta.num_threads = num_threads;
  cta.body = &thread;
  cta.random = 1;
  blockDim = {num_threads, 1, 1};
  gridDim = grid;
  run_grid(grid, shared_bytes);
  if (!cta.fault) {
    return nullptr;
  }
  last_fault = *cta.fault;
  cta.fault.reset();
  cta.threads.clear();  // fibers that were left in the middle
  return last_fault.c_str();
}

void fail(const char* what) {
  set_fault("thread " + std::to_string(cta.running) + ": " + what);
  for (;;) {
    switch_to(self().context, scheduler);
  }
}

void wait_for_cta() { wait(State::kAtCta, "__syncthreads"); }

const std::byte* exchange(const char* operation, const void* value, size_t bytes) {
  auto& values = cta.warps[cta.running / kWarp].values[self().num_exchanges++ % 2];
  if (bytes > 0) {
    std::memcpy(values[cta.running % kWarp], value, bytes);
  }
  wait(State::kAtWarp, operation);
  return values[0];
}

void* dynamic_shared() { return cta.dynamic.get(); }

void* static_shared(const void* variable, size_t bytes) {
  auto& memory = cta.variables[variable];
  if (memory == nullptr) {
    memory.reset(new std::byte[bytes]);
    std::memset(memory.get(), kPoison, bytes);
  }
  return memory.get();
}

void copy_async(void* to, const void* from, size_t bytes, size_t zero_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % (bytes + zero_bytes) != 0 ||
      reinterpret_cast<uintptr_t>(from) % (bytes + zero_bytes) != 0) {
    fail("an asynchronous copy is not aligned to its size");
  }
  if (from == nullptr) {
    fail("an asynchronous copy has no address, which one of no bytes needs, too");
  }
  std::memset(to, kPoison, bytes + zero_bytes);
  self().open_group.push_back({to, from, bytes, zero_bytes});
}

void commit_copies() { self().groups.push_back(std::exchange(self().open_group, {})); }

void wait_for_copies(size_t pending_groups) {
  auto& groups = self().groups;
  while (groups.size() > pending_groups) {
    for (const Copy& copy : groups.front()) {
      if (copy.bytes > 0) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      }
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zero_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace dllm::simt
