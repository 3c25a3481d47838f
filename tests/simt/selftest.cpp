// Kernels with one fault each, and one without: `selftest NAME` prints what the emulator says of it.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kDepth = 16, kColumns = 8;

struct Product {
  const BFloat16* a;  // [16, kDepth]
  const BFloat16* b;  // [kDepth, kColumns]
  float* c;           // [16, kColumns]
};

struct alignas(16) Tiles {
  BFloat16 a[16][kDepth];
  BFloat16 b[kDepth][kColumns];
};

// c = a b by one warp: 48 rows of 16 bytes copied, of a two each.
template <bool waits, bool synchronises>
void product(Product args) {
  DLLM_SHARED(Tiles, tiles);
  const unsigned lane = threadIdx.x;
  copy_async_16(&tiles.a[lane / 2][lane % 2 * 8], args.a + lane * 8, true);
  if (lane < kDepth) {
    copy_async_16(&tiles.b[lane], args.b + lane * 8, true);
  }
  commit_copies();
  if constexpr (waits) {
    wait_for_copies<0>();
  }
  if constexpr (synchronises) {
    __syncwarp();
  }
  uint32_t a[4], b[4];
  load_matrices(a, &tiles.a[lane % 16][lane / 16 * 8]);
  load_matrices_transposed(b, &tiles.b[lane % 16]);
  float c[4] = {};
  multiply_add<BFloat16>(c, a, b[0], b[1]);
  wait_for_copies<0>();
  for (unsigned i = 0; i < 4; ++i) {
    args.c[(lane / 4 + i / 2 * 8) * kColumns + lane % 4 * 2 + i % 2] = c[i];
  }
}

template <bool waits, bool synchronises>
const char* run_product() {
  std::vector<BFloat16> a(16 * kDepth), b(kDepth * kColumns);
  std::vector<float> c(16 * kColumns);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = from_float<BFloat16>(static_cast<float>(i % 13));
  }
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = from_float<BFloat16>(static_cast<float>(i % 7) - 3);
  }
  const Product args = {a.data(), b.data(), c.data()};
  if (const char* fault =
          launch(product<waits, synchronises>, {.num_ctas = dim3{1}, .num_threads = 32}, nullptr, args)) {
    return fault;
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += to_float(a[row * kDepth + k]) * to_float(b[k * kColumns + column]);
      }
      if (c[row * kColumns + column] != sum) {
        return "the product is wrong";
      }
    }
  }
  return nullptr;
}

// Each thread leaves its number for the thread `distance` further.
template <bool synchronises>
void pass_on(int* to, unsigned distance) {
  DLLM_DYNAMIC_SHARED(bytes);
  int* numbers = reinterpret_cast<int*>(bytes);
  numbers[threadIdx.x] = threadIdx.x;
  if constexpr (synchronises) {
    __syncthreads();
  }
  to[threadIdx.x] = numbers[(threadIdx.x + distance) % blockDim.x];
}

template <bool synchronises>
const char* run_pass_on(unsigned distance) {
  std::vector<int> to(128);
  const Geometry geometry = {.num_ctas = dim3{3}, .num_threads = 128, .shared_bytes = 4 * 128};
  if (const char* fault = launch(pass_on<synchronises>, geometry, nullptr, to.data(), distance)) {
    return fault;
  }
  for (unsigned i = 0; i < 128; ++i) {
    if (to[i] != static_cast<int>((i + distance) % 128)) {
      return "a number is wrong";
    }
  }
  return nullptr;
}

const char* run_one(void (*kernel)()) { return launch(kernel, {.num_ctas = dim3{1}, .num_threads = 64}, nullptr); }

alignas(16) BFloat16 global[16];

const std::map<std::string, const char* (*)()> kCases = {
    {"product", [] { return run_product<true, true>(); }},
    {"no_wait", [] { return run_product<false, true>(); }},
    {"no_warp_barrier", [] { return run_product<true, false>(); }},
    {"pass_on", [] { return run_pass_on<true>(1); }},
    {"no_barrier_before", [] { return run_pass_on<false>(32); }},
    {"no_barrier_behind", [] { return run_pass_on<false>(96); }},
    {"divergent_barrier", [] { return run_one([] { threadIdx.x < 32 ? __syncthreads() : void(); }); }},
    {"divergent_warp", [] { return run_one([] { threadIdx.x == 5 ? __syncthreads() : __syncwarp(); }); }},
    {"partial_mask", [] { return run_one([] { __shfl_sync(0xffff, 1, 0); }); }},
    {"misaligned",
     [] {
       return run_one([] {
         DLLM_SHARED(Tiles, tiles);
         copy_async_16(&tiles, global + 1, true);
       });
     }},
    {"never_waited",
     [] {
       return run_one([] {
         DLLM_SHARED(Tiles, tiles);
         copy_async_16(&tiles, global, true);
       });
     }},
};

}  // namespace
}  // namespace dllm::cuda

int main(int num_args, char** args) {
  const auto found = dllm::cuda::kCases.find(num_args == 2 ? args[1] : "");
  if (found == dllm::cuda::kCases.end()) {
    return 2;
  }
  const char* fault = found->second();
  std::puts(fault == nullptr ? "no fault" : fault);
  return 0;
}
