#include "../vocab_stats.h"

#include "panel.h"
#include "vocab_stats_lanes.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

constexpr int kTileIds = 64;     // 64 ids x 512 of their depth: a weight tile for the L2 cache, also as float32
constexpr int64_t kDepth = 512;  // a panel of so many times 48 float32: 98 KB beside it
constexpr int64_t kPanelRows = kMaxVecs * kLanes;

struct BFloat16 {
  uint16_t bits;
};

float to_float(float value) { return value; }
float to_float(_Float16 value) { return static_cast<float>(value); }
float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// How numbers of type T are packed for products with Number: its Element holds kCount of them.
template <typename T, typename Number>
struct Packing {
  static constexpr int64_t kCount = 1;
  static float pack(const T* from) { return to_float(*from); }
};

#if defined(__AVX512BF16__)
template <>
struct Packing<BFloat16, BFloat16Pair> {
  static constexpr int64_t kCount = 2;
  static int32_t pack(const BFloat16* from) {
    return static_cast<int32_t>(from[0].bits | static_cast<uint32_t>(from[1].bits) << 16);
  }
};
#endif

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// One work, of numbers of type T that are multiplied as Number.
template <typename T, typename Number>
class Worker {
  using Element = typename Number::Element;
  using Pack = Packing<T, Number>;

 public:
  explicit Worker(const VocabWork& work)
      : work_(work),
        args_(work.args),
        depth_(args_.hidden_size / Pack::kCount),
        num_lanes_(round_up(work.num_rows, kLanes)) {}

  void run() {
    if (args_.weight != nullptr) {
      pack_panels();
    }
#pragma omp parallel
    {
      alignas(64) float tile[kTileIds * kMaxWorkRows];
      alignas(64) VocabLanes lanes[kMaxWorkRows / kLanes];
      for (int64_t lane = 0; lane < num_lanes_; lane += kLanes) {
        lanes[lane / kLanes].begin(args_, work_.rows + lane, work_.num_rows - lane);
      }
      // Ascending for each thread: of equal logits the lowest id wins.
#pragma omp for schedule(monotonic : dynamic)
      for (int64_t chunk = 0; chunk < num_vocab_chunks(args_.num_ids); ++chunk) {
        add_chunk(chunk, tile, lanes);
      }
    }
  }

 private:
  void add_chunk(int64_t chunk, float* tile, VocabLanes* lanes) const {
    const int64_t end = min((chunk + 1) * kVocabChunk, args_.num_ids);
    const int64_t num_groups = num_lanes_ / kLanes;
    for (int64_t group = 0; group < num_groups; ++group) {
      lanes[group].begin_chunk();
    }
    for (int64_t begin = chunk * kVocabChunk; begin < end; begin += kTileIds) {
      const int num_ids = static_cast<int>(min(kTileIds, end - begin));
      fill_tile(begin, num_ids, tile);
      if (work_.logits != nullptr) {
        keep_logits(begin, num_ids, tile);
        continue;
      }
      keep_given(begin, num_ids, tile);
      for (int64_t group = 0; group < num_groups; ++group) {
        lanes[group].add(tile + group * kLanes, num_lanes_, args_.first_id + begin, num_ids);
      }
    }
    for (int64_t group = 0; group < num_groups && work_.logits == nullptr; ++group) {
      const int64_t lane = group * kLanes;
      lanes[group].end_chunk(work_.rows + lane, work_.num_rows - lane, args_.partials + chunk * args_.num_rows);
    }
  }

  // tile[i][lane] = the logit of id begin + i
  void fill_tile(int64_t begin, int num_ids, float* tile) const {
    if (args_.weight == nullptr) {
      for (int64_t lane = 0; lane < num_lanes_; ++lane) {
        const T* row = row_of(lane) + begin;
        for (int i = 0; i < num_ids; ++i) {
          tile[i * num_lanes_ + lane] = to_float(row[i]);
        }
      }
    } else {
      multiply(begin, num_ids, tile);
    }
    for (int32_t i = 0; i < args_.num_excluded; ++i) {
      const int64_t place = args_.excluded_ids[i] - args_.first_id - begin;
      for (int64_t lane = 0; lane < num_lanes_ && place >= 0 && place < num_ids; ++lane) {
        tile[place * num_lanes_ + lane] = -kInfinity;
      }
    }
    for (int64_t lane = 0; lane < work_.num_rows && args_.allowed != nullptr; ++lane) {
      for (int i = 0; i < num_ids; ++i) {
        if (!is_allowed(args_, work_.rows[lane], args_.first_id + begin + i)) {
          tile[i * num_lanes_ + lane] = -kInfinity;
        }
      }
    }
  }

  void multiply(int64_t begin, int num_ids, float* tile) const {
    for (int64_t i = 0; i < num_ids * num_lanes_; ++i) {
      tile[i] = 0.0f;
    }
    for (int64_t from = 0; from < depth_; from += kDepth) {
      const int64_t depth = min(kDepth, depth_ - from);
      Element scratch[kConverts ? kTileIds * kDepth : 1];
      const Matrix<Element> weight = weight_tile(begin, num_ids, from, depth, scratch);
      for (int64_t lane = 0; lane < num_lanes_; lane += kPanelRows) {
        const int64_t width = min(kPanelRows, num_lanes_ - lane);
        const Element* panel = panels() + lane * depth_ + from * width;
        switch (width / kLanes) {
          case 1:
            add_products<1>(weight, num_ids, panel, depth, tile + lane);
            break;
          case 2:
            add_products<2>(weight, num_ids, panel, depth, tile + lane);
            break;
          default:
            add_products<3>(weight, num_ids, panel, depth, tile + lane);
        }
      }
    }
  }

  template <int kVecs>
  void add_products(Matrix<Element> weight, int num_ids, const Element* panel, int64_t depth, float* out) const {
    int i = 0;
    for (; i + kTileRows <= num_ids; i += kTileRows) {
      tile_product<Number, kTileRows, kVecs>(weight, panel, kVecs * kLanes, depth, out + i * num_lanes_, num_lanes_);
      weight.data += kTileRows * weight.row_stride;
    }
    for (; i < num_ids; ++i) {
      tile_product<Number, 1, kVecs>(weight, panel, kVecs * kLanes, depth, out + i * num_lanes_, num_lanes_);
      weight.data += weight.row_stride;
    }
  }

  // Elements [from, from + depth) of the weight's rows, where they lie or converted.
  Matrix<Element> weight_tile(int64_t begin, int num_ids, int64_t from, int64_t depth, Element* scratch) const {
    const T* weight = static_cast<const T*>(args_.weight) + begin * args_.weight_stride + from * Pack::kCount;
    if constexpr (kConverts) {
      for (int i = 0; i < num_ids; ++i) {
        for (int64_t k = 0; k < depth; ++k) {
          scratch[i * kDepth + k] = to_float(weight[i * args_.weight_stride + k]);
        }
      }
      return {scratch, kDepth, 1};
    } else {
      return {reinterpret_cast<const Element*>(weight), args_.weight_stride / Pack::kCount, 1};
    }
  }

  // A panel is [depth][width], width a multiple of kLanes; panels follow each other.
  void pack_panels() const {
    const int64_t num_slices = (depth_ + kDepth - 1) / kDepth;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t first = 0; first < num_lanes_; first += kPanelRows) {
      for (int64_t slice = 0; slice < num_slices; ++slice) {
        const int64_t width = min(kPanelRows, num_lanes_ - first);
        const int64_t end = min((slice + 1) * kDepth, depth_);
        Element* panel = panels() + first * depth_;
        for (int64_t k = slice * kDepth; k < end; ++k) {
          for (int64_t lane = 0; lane < width; ++lane) {
            panel[k * width + lane] = Pack::pack(row_of(first + lane) + k * Pack::kCount);
          }
        }
      }
    }
  }

  void keep_logits(int64_t begin, int num_ids, const float* tile) const {
    for (int64_t lane = 0; lane < work_.num_rows; ++lane) {
      for (int i = 0; i < num_ids; ++i) {
        work_.logits[lane * args_.num_ids + begin + i] = tile[i * num_lanes_ + lane];
      }
    }
  }

  void keep_given(int64_t begin, int num_ids, const float* tile) const {
    for (int64_t lane = 0; lane < work_.num_rows; ++lane) {
      for (int64_t i = work_.rows[lane] * args_.num_given; i < (work_.rows[lane] + 1) * args_.num_given; ++i) {
        const int64_t place = args_.given_ids[i] - args_.first_id - begin;
        if (place >= 0 && place < num_ids) {
          args_.given_logits[i] = tile[place * num_lanes_ + lane];
        }
      }
    }
  }

  // The row of a lane; the last one again for lanes that stand for none.
  const T* row_of(int64_t lane) const {
    return static_cast<const T*>(args_.rows) + work_.rows[min(lane, work_.num_rows - 1)] * args_.row_stride;
  }

  Element* panels() const { return reinterpret_cast<Element*>(work_.panels); }

  static constexpr bool kConverts = sizeof(T) * Pack::kCount != sizeof(Element);

  const VocabWork& work_;
  const VocabStatsArgs& args_;
  const int64_t depth_;      // Elements of a row
  const int64_t num_lanes_;  // rows of the work, rounded up to kLanes
};

#if defined(__AVX512BF16__)
// Do the weight's numbers lie in aligned pairs?
bool is_paired(const VocabStatsArgs& args) {
  return args.hidden_size % 2 == 0 && args.weight_stride % 2 == 0 && reinterpret_cast<uintptr_t>(args.weight) % 4 == 0;
}
#endif

}  // namespace

void vocab_work(const VocabWork& work) {
  switch (work.args.type) {
    case FloatType::kFloat32:
      return Worker<float, Float>(work).run();
    case FloatType::kFloat16:
      return Worker<_Float16, Float>(work).run();
    case FloatType::kBFloat16:
#if defined(__AVX512BF16__)
      if (work.args.weight != nullptr && is_paired(work.args)) {
        return Worker<BFloat16, BFloat16Pair>(work).run();
      }
#endif
      return Worker<BFloat16, Float>(work).run();
  }
}

}  // namespace dllm::cpu::DLLM_ISA
